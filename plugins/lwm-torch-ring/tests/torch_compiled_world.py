"""One of two ranks that compile: ``python torch_compiled_world.py WHAT`` prints, as JSON, what came out on rank 0.

``layer`` compares a compiled layer with the plain one, transfers and plans counted; ``trainer MESH`` a trainer's steps.

Shapes: B batch, C tokens of a rank, E hidden size.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch_cases import ROPE, make_trainer, model, rows_of

from lwm_core.attention import AttentionMask
from lwm_torch_ring.attention.blocks import Plan
from lwm_torch_ring.attention.peers import Peers
from lwm_torch_ring.model.llama import Block, Compute
from lwm_torch_ring.model.rope import rope_angles, rope_tables

CAUSAL = AttentionMask("causal")
DONE: Counter[str] = Counter()
"""Transfers and plans."""


def count() -> None:
    """Write down every transfer and every plan from now on."""
    for of, name in ((Peers, "post"), (Peers, "exchange"), (Plan, "__init__")):
        plain = getattr(of, name)

        def counting(*given: Any, _plain: Any = plain, _name: str = name) -> Any:
            DONE[_name] += 1
            return _plain(*given)

        setattr(of, name, counting)


class Graphs:
    """A backend of torch.compile that runs what it is given as it is, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


def layers(strategy: str, remat: Any) -> dict[str, Any]:
    """Two layers, one after the other, of packed rows of both modalities; how the compiled ones differ."""
    trainer = make_trainer("1,1,1,2", attention={"strategy": strategy})
    backend, mine = trainer.current.backend, trainer.current.batch(rows_of(trainer))[0]
    config, how = model(), Compute(remat=remat)
    torch.manual_seed(3 + dist.get_rank())
    x, dy = torch.randn(2, *mine["tokens"].shape, config.hidden_size)
    torch.manual_seed(5)
    blocks = [Block(config, number) for number in range(2)]
    for block in blocks:
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    cos, sin = rope_angles(rope_tables(ROPE, config.head_dim, 72, x.device), mine["positions"])

    def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        out: Tensor = backend.attend(q, k, v, CAUSAL, mine["segment_ids"])
        return out

    graphs, found = Graphs(), []
    for compiled in (False, True):
        mine["segment_ids"].add_(0)  # another batch to the plans
        DONE.clear()
        given = x.clone().requires_grad_()
        stream = given
        for block in blocks:
            run = torch.compile(block.forward, backend=graphs, fullgraph=True, dynamic=False) if compiled else block
            stream = run(stream, cos, sin, attend, how)
        stream.backward(dy)
        results = [stream.detach(), given.grad]
        for block in blocks:
            results += [parameter.grad for parameter in block.parameters()]
            block.zero_grad()
        found.append((results, dict(DONE)))
    (plain, plain_done), (ours, done) = found
    assert all(x is not None and x.any() for x in plain)
    return {
        "equal": all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True)),
        "graphs": graphs.count, "done": done, "plain done": plain_done,
    }  # fmt: skip


def layer() -> Any:
    count()
    cases = [("ring", "attention"), ("ring", "full"), ("ulysses", "attention")]
    return {f"{strategy} {remat}": layers(strategy, remat) for strategy, remat in cases}


def trainer() -> Any:
    """Losses and gradient norms of some steps of a trainer that shares parameters out, plain and compiled."""
    told: dict[str, Any] = {}
    for compile in (False, True):
        one = make_trainer(sys.argv[2], accumulate=2, compile=compile)
        steps = [one.step(rows_of(one), step) for step in range(3)]
        told[str(compile)] = [[step["loss"], step["grad_norm"]] for step in steps]
        told[f"evaluated {compile}"] = one.evaluate(rows_of(one))["loss"]
    return told


def main() -> None:
    torch.set_num_threads(1)
    told = {"layer": layer, "trainer": trainer}[sys.argv[1]]()
    if dist.get_rank() == 0:
        print(json.dumps(told))
    dist.barrier()


if __name__ == "__main__":
    main()
