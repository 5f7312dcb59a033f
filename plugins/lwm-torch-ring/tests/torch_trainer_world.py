"""One rank of a trainer's tests: ``python torch_trainer_world.py CASES`` does what each case of a JSON list asks.

A case is ``{"do": ..., "mesh": ..., ...}``; rank 0 prints a JSON list of what came out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch_cases import ROPE, make_trainer, model, rows_of, stage

from lwm_core.attention import AttentionMask
from lwm_core.protocols import SamplingSpec
from lwm_core.reference import attention_forward
from lwm_core.run import Model, lead
from lwm_core.testing.memory import peak_growth
from lwm_core.weights import read_model_folder, write_model_folder
from lwm_torch_ring.attention.kernels.math import MathKernel
from lwm_torch_ring.attention.peers import peers_on
from lwm_torch_ring.generate.cache import LayerCache
from lwm_torch_ring.generate.reading import _pass_kv, _pass_q, one_query
from lwm_torch_ring.model import sharding
from lwm_torch_ring.model.sharding import local_part, named, whole
from lwm_torch_ring.train.trainer import TorchTrainer

PROMPTS = [[5, 9, 60, 3], [(7 * n) % 100 for n in range(70)], [(11 * n) % 100 for n in range(33)]]


def gradients(trainer: TorchTrainer) -> dict[str, Any]:
    """What the first step's gradients are, each weighted so that a permutation of them would show."""
    trainer._losses.run(trainer.current.batch(rows_of(trainer), trainer.stage.accumulate), backward=True)
    found = {}
    for name, parameter in named(trainer.network):
        assert parameter.grad is not None, name
        gradient = whole(parameter.grad).double()
        ramp = torch.linspace(-1, 1, gradient.numel(), dtype=torch.float64).view(gradient.shape)
        found[name] = [float(gradient.norm()), float((gradient * ramp).sum())]
        parameter.grad = None
    return found


def steps(trainer: TorchTrainer, count: int, first: int = 0) -> list[list[float]]:
    """Loss and gradient norm of some steps."""
    told = [trainer.step(rows_of(trainer), step) for step in range(first, first + count)]
    return [[one["loss"], one["loss_text"], one["loss_vision"], one["grad_norm"]] for one in told]


def train(trainer: TorchTrainer, case: dict[str, Any]) -> Any:
    return {
        "gradients": gradients(trainer),
        "steps": steps(trainer, 3),
        "evaluated": trainer.evaluate(rows_of(trainer))["loss"],
        "held": sum(local_part(p).numel() for _, p in named(trainer.network)),
        "after": steps(trainer, 1, 3),  # what was brought together to evaluate must not be used again
    }


def generate(trainer: TorchTrainer, case: dict[str, Any]) -> Any:
    for step in range(2):
        trainer.step(rows_of(trainer), step)
    generator = trainer.generator()
    drawn = SamplingSpec(5, temperature=0.9, top_k=30, top_p=0.95, seed=3)
    return {
        "greedy": generator.generate(PROMPTS, SamplingSpec(5)),
        "apart": [generator.generate([prompt], SamplingSpec(5))[0] for prompt in PROMPTS],
        "streamed": list(generator.stream(PROMPTS[1], SamplingSpec(5))),
        "drawn": generator.generate(PROMPTS, drawn),
        "guided": guided(generator),
        "scores": [float(x) for x in generator.log_likelihood([*PROMPTS[1], 105, 110])],
        "steps": steps(trainer, 1, 2),
    }


def guided(generator: Any) -> list[int]:
    """Of two prompts of unequal lengths, in two turns."""
    session = generator.session(guided=True)
    session.read(PROMPTS[1], PROMPTS[0])
    told = list(session.stream(SamplingSpec(3, guidance=3.0)))
    session.read([7])
    told += session.stream(SamplingSpec(3, temperature=0.9, seed=3, guidance=-2.0))
    session.unguide()
    return [*told, *session.stream(SamplingSpec(3))]


def converse(trainer: TorchTrainer, case: dict[str, Any]) -> Any:
    """Turns of many tokens, of one and of some, one of them left early; what each gave, and the same as a prompt."""
    generator, told = trainer.generator(), []
    session = generator.session()
    for turn, sampling in ((PROMPTS[1], SamplingSpec(5)), ([7], SamplingSpec(200)), (PROMPTS[2], SamplingSpec(5))):
        session.read(turn)
        held, stream = list(session.tokens), session.stream(sampling)
        given = [token for _, token in zip(range(case["most"]), stream, strict=False)]
        stream.close()
        told.append([given, generator.generate([held], SamplingSpec(len(given)))[0], len(session.tokens) - len(held)])
    session.close()
    told.append(steps(trainer, 1))
    return told


def save(trainer: TorchTrainer, case: dict[str, Any]) -> Any:
    """Two steps, a save that goes on while the third is made."""
    told = steps(trainer, 2)
    handle = trainer.save(Path(case["folder"]))
    told += steps(trainer, 1, 2)
    handle.wait()
    return told


def restore(trainer: TorchTrainer, case: dict[str, Any]) -> Any:
    trainer.restore(Path(case["folder"]))
    return steps(trainer, 1, 2)


def move(trainer: TorchTrainer, case: dict[str, Any]) -> Any:
    """A stage on one mesh, then a stage on another: parameters stay, moments begin anew."""
    told = steps(trainer, 2)
    trainer.begin_stage(stage(case["to"]))
    return told + steps(trainer, 2)


def read(trainer: TorchTrainer, case: dict[str, Any]) -> Any:
    """Queries over a cache that lies on all ranks, both ways and one at a time: how far each is from the oracle."""
    peers = peers_on(trainer.current.meshes.axes, "sp")
    random = np.random.default_rng(8)
    lengths, far = case["lengths"], {}
    longest, new, heads, kv_heads, dim = max(lengths), 6, 4, 2, 16
    k, v = (random.standard_normal((len(lengths), longest, kv_heads, dim), dtype=np.float32) for _ in range(2))
    q = random.standard_normal((len(lengths), peers.size, new, heads, dim), dtype=np.float32)
    layer = LayerCache("compute")
    owner = random.integers(0, peers.size, longest)  # any slot may lie anywhere
    cached = [[int((owner[:used] == rank).sum()) for used in lengths] for rank in range(peers.size)]
    chosen = [torch.from_numpy(np.flatnonzero(owner[:used] == peers.rank)) for used in lengths]
    layer.add(torch.from_numpy(k), torch.from_numpy(v), chosen)
    mine, kernel = torch.from_numpy(q[:, peers.rank]), MathKernel(dim**-0.5, 8)
    results = {
        "pass-Q": _pass_q(mine, layer, cached, peers, kernel).out,
        "pass-KV": _pass_kv(mine, layer, cached, peers, kernel).out,
        "one": torch.stack([one_query(torch.from_numpy(q[:, 0, i]), layer, peers) for i in range(new)], 1),
    }
    for name, got in results.items():
        for b, used in enumerate(lengths):
            asked = q[b, 0 if name == "one" else peers.rank][None]
            padded = np.concatenate([asked, np.zeros((1, used - new, heads, dim))], 1)  # the oracle's is square
            out, _ = attention_forward(padded, k[b : b + 1, :used], v[b : b + 1, :used], AttentionMask("full"))
            error = np.abs(got[b].numpy() - out[0, :new]).max()
            far[name] = max(far.get(name, 0.0), float(error))
    return far


def export(trainer: TorchTrainer, case: dict[str, Any]) -> Any:
    """A model folder, written as rank 0 leads: how far it grows by that, over the largest parameter in float32."""
    sharding._BLOCK = case.get("block", sharding._BLOCK)
    folder, config, dtype = Path(case["folder"]), trainer.context.model, case["dtype"]

    def write(asked: Model) -> None:
        write_model_folder(folder, config, ROPE, 72, asked.iter_parameters(), dtype)

    if "model" in case:
        lead(trainer, write)  # the first time loads code and opens connections
    grown = peak_growth(lambda: lead(trainer, write))
    trainer.processes.share(None)  # until all is written
    written = read_model_folder(folder).parameters
    whole_ones = {name: whole(parameter.detach()).numpy() for name, parameter in named(trainer.network)}
    return {
        "same": all(np.array_equal(written[name], one.astype(written[name].dtype)) for name, one in whole_ones.items()),
        "growth": grown / (4 * max(one.size for one in whole_ones.values())),
    }


DO = {one.__name__: one for one in (export, read, converse, train, generate, save, restore, move)}


def main() -> None:
    torch.set_num_threads(1)
    told = []
    for case in json.loads(sys.argv[1]):
        trainer = make_trainer(case["mesh"], config=model(**case.get("model", {})), **case.get("more", {}))
        told.append(DO[case["do"]](trainer, case))
        trainer.processes.share(None)
    if trainer.processes.rank == 0:
        print(json.dumps(told))


if __name__ == "__main__":
    main()
