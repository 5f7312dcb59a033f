"""Compiled layers: whole programs on several ranks, equal to the plain ones; what cannot be compiled is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch_cases import make_trainer, rows_of, run_ranks

from lwm_core.attention import AttentionMask
from lwm_core.errors import UnsupportedError
from lwm_core.protocols import AttentionAxes
from lwm_torch_ring.attention.backend import factory
from lwm_torch_ring.attention.options import AttentionOptions
from lwm_torch_ring.train.options import TrainerOptions

SCRIPT = Path(__file__).parent / "torch_compiled_world.py"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))

# Of two layers on two ranks. A ring posts once forward and three times backward (keys, their sums, these home); with
# heads exchanged it is two exchanges each way, which are made again in a layer that is rematerialised, though what
# attention gave is kept. A plan is worked out once for the batch.
DONE = {
    "ring attention": {"post": 8, "__init__": 1},
    "ring full": {"post": 10, "__init__": 1},
    "ulysses attention": {"exchange": 12, "__init__": 1},
}
SECONDS = 500.0
"""A rank compiles for a minute on a busy machine."""


@pytest.mark.slow
def test_a_compiled_program_has_no_break() -> None:
    """Forward and backward equal the plain ones to the bit; another backend is another program."""
    ids = torch.ones(2, 32, dtype=torch.int32)
    ids[:, 20:] = 2

    class Layer(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any) -> Any:
            return self.backend.attend(2 * q, k, v, AttentionMask("causal"), ids).sin()

    layer = Layer()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for layout, chunk in (("zigzag", 8), ("zigzag", 16)):
        layer.backend = factory.build(AttentionOptions(layout=layout, chunk=chunk), None, AttentionAxes(), 32)
        results = []
        for function in (compiled, layer):
            random = torch.Generator().manual_seed(0)
            given = [torch.randn(2, 32, heads, 8, generator=random).requires_grad_() for heads in (4, 2, 2)]
            out = function(*given)
            out.sum().backward()
            results.append([out.detach(), *(x.grad for x in given)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.slow
def test_a_compiled_layer_of_two_ranks_is_one_program() -> None:
    """Packed rows, rematerialised or not: the same to the bit, one graph for all layers, the same transfers."""
    told = json.loads(run_ranks(2, SCRIPT, "layer", seconds=SECONDS)[0])
    for case, expected in DONE.items():
        assert told[case] == {"equal": True, "graphs": 1, "done": expected, "plain done": expected}, case


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="torch.compile's own backend needs a C++ compiler, and there is none here")
@pytest.mark.parametrize("mesh", ["1,1,1,2", "1,1,2,1"])
def test_a_compiling_trainer_is_the_plain_one(mesh: str) -> None:
    """Sequence and parameters shared out over two ranks, or heads; micro-batches; with torch's own backend."""
    told = json.loads(run_ranks(2, SCRIPT, "trainer", mesh, seconds=SECONDS)[0])
    np.testing.assert_allclose(told["True"], told["False"], rtol=1e-5)
    assert told["evaluated True"] == pytest.approx(told["evaluated False"], rel=1e-5)
    assert told["True"][2][0] < told["True"][0][0]


def test_what_is_not_compiled_is_refused() -> None:
    with pytest.raises(ValidationError, match="compile does not go with remat = 'offload'"):
        TrainerOptions(compile=True, remat="offload")


@pytest.mark.slow
def test_without_a_compiler_the_first_step_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, with what to do; without the option nothing is compiled."""
    from torch._inductor import config

    monkeypatch.setattr(config, "force_disable_caches", True)
    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    trainer = make_trainer(compile=True)
    with pytest.raises(
        UnsupportedError, match=r"cannot be compiled here \(.*\); set trainer\.compile to false"
    ) as told:
        trainer.step(rows_of(trainer), 0)
    assert "\n" not in str(told.value)
    plain = make_trainer()
    assert plain.step(rows_of(plain), 0)["loss"] > 0
