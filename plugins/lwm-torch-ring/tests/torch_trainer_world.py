"""One rank of a trainer's tests: ``python torch_trainer_world.py CASES`` does what each case of a JSON list asks.

A case is ``{"do": ..., "mesh": ..., ...}``; rank 0 prints a JSON list of what came out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch_cases import make_trainer, rows_of, stage

from lwm_core.protocols import SamplingSpec
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
        "scores": [float(x) for x in generator.log_likelihood([*PROMPTS[1], 105, 110])],
        "steps": steps(trainer, 1, 2),
    }


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


DO = {"train": train, "generate": generate, "save": save, "restore": restore, "move": move}


def main() -> None:
    torch.set_num_threads(1)
    told = []
    for case in json.loads(sys.argv[1]):
        trainer = make_trainer(case["mesh"], **case.get("more", {}))
        told.append(DO[case["do"]](trainer, case))
        trainer.processes.share(None)
    if trainer.processes.rank == 0:
        print(json.dumps(told))


if __name__ == "__main__":
    main()
