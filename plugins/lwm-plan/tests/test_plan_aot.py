"""``lwm plan --aot``: the compiler's figures beside the plan's, from a trainer that makes them up; and its refusals."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from lwm_core.pipeline import Pipeline
from lwm_core.protocols import Collective, CompiledStep, Stage
from lwm_plan.hardware import read_machine
from lwm_plan.plan import plan
from lwm_plan.sources import read_source

GIB = 2**30
MADE_UP = CompiledStep(
    "", 256, "TPU v4", 41.6, limit_bytes=30 * GIB, argument_bytes=GIB, temporary_bytes=11 * GIB, output_bytes=3 * 2**20,
    code_bytes=61 * 2**20, kernels={"forward": 32}, choices=("attention ring",),
    collectives=(
        Collective("reduce-scatter", "f32[4]", 40 * GIB, 2, ("tp",), 30 * GIB),
        Collective("all-gather", "bf16[8]", 3 * GIB, 5, ("fsdp", "sp"), 2 * GIB),
        Collective("reduce-scatter", "f32[2]", GIB, 7, ("tp",), GIB // 2), Collective("all-reduce", "f32[1]", 8, 1),
    ),
)  # fmt: skip
TOTAL = 12 * GIB + 64 * 2**20
REFUSED = replace(MADE_UP, problem="RESOURCE_EXHAUSTED: ran out\nlargest: 3G", collectives=(), temporary_bytes=0)

Run = Callable[..., tuple[int, str, str]]


class StandIn:
    """A trainer that compiles nothing and answers at once."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.answers: dict[str, CompiledStep] = {}

    def compile_ahead(self, stage: Stage, topology: str) -> CompiledStep:
        """What was made up for the stage."""
        self.asked.append((stage.name, topology))
        return replace(self.answers.get(stage.name, MADE_UP), topology=topology)


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """In the place of the recipe's."""
    made = StandIn()
    monkeypatch.setattr(Pipeline, "make_trainer", lambda self: made)
    return made


def planned(stage: str) -> Any:
    """The stage's plan on the machine of the paper, without a compiler."""
    (one,) = plan(read_source("lwm-text", [], None, None, None), read_machine("v4:8x8x4"), (stage,))
    return one.chosen


def test_the_table_has_the_compilers_memory_beside_the_plans(lwm: Run, trainer: StandIn) -> None:
    trainer.answers["128K"] = REFUSED
    code, out, err = lwm("lwm-text", "--aot", "v4:8x8x4", "--stage", "32K", "--stage", "128K")
    assert code == 1  # one was refused, which the plan says fits
    assert trainer.asked == [("32K", "v4:8x8x4"), ("128K", "v4:8x8x4")]
    head, columns, first, second, *_ = out.splitlines()
    assert head.startswith("recipe lwm-text on v4:8x8x4: 256 devices")
    assert re.search(r"GiB a device +compiled +off +fits", columns)
    mine = planned("32K").memory.total
    assert f"{mine / GIB:.2f} {TOTAL / GIB:.2f} {(mine - TOTAL) / TOTAL:+.1%} yes" in " ".join(first.split())
    assert re.search(r"11\.94 +refused +yes", second)
    assert (
        "128K: compiled for 256 x TPU v4 in 42 s: does not fit, where 11.94 GiB are planned and fit: RESOURCE_EXH"
        in out
    )
    assert "largest: 3G" not in out
    assert (
        "32K: transfers compiled: reduce-scatter 87.00 GiB in 9, all-gather 15.00 GiB in 5, all-reduce 0.0 MiB" in out
    )
    assert re.search(r"32K: transfers planned: stream over tp [\d.]+ GiB, parameters over fsdp [\d.]+ GiB\n", out)
    stream, parameters = (one.bytes / GIB for one in planned("32K").timing.transfers)
    assert (
        f"32K: sent over axes, planned | compiled: tp {stream:.2f} GiB | 63.50 GiB, fsdp {parameters:.2f} GiB | 0.00 "
        "GiB, fsdp+sp 0.00 GiB | 10.00 GiB\n" in out
    )
    assert f"{TOTAL / GIB:.2f} GiB of 30.00 GiB" in out and "| 11.00 GiB" in out and "| 1.00 GiB" in out
    assert err.splitlines() == [f"compiled {name} for v4:8x8x4 in 42 s" for name in ("32K", "128K")]


def test_json_has_both_sides_and_they_add_up(lwm: Run, trainer: StandIn) -> None:
    code, out, _ = lwm("lwm-text", "--aot", "v4:8x8x4", "--hardware", "v4-512", "--stage", "1M", "--json")
    (one,) = json.loads(out)["stages"]
    mine = planned("1M").memory
    found = one["compiled"]
    assert code == 0 and found["fits"] and found["problem"] is None and found["topology"] == "v4:8x8x4"
    assert found["bytes"] == TOTAL == sum(side["compiled"] for side in found["parts"].values())
    assert sum(side["planned"] for side in found["parts"].values()) == mine.total == one["bytes_per_device"]["total"]
    assert found["off"] == pytest.approx(mine.total / TOTAL - 1)
    assert found["parts"]["parameters, optimizer and batch"]["planned"] == 3 * mine.parameters + mine.batch
    assert found["sent"] == {
        "reduce-scatter": {"count": 9, "bytes": 87 * GIB}, "all-gather": {"count": 5, "bytes": 15 * GIB},
        "all-reduce": {"count": 1, "bytes": 8},
    }  # fmt: skip
    assert [(c["kind"], c["type"], c["bytes"], c["count"], c["axes"], c["sent"]) for c in found["collectives"]] == [
        (c.kind, c.type, c.bytes, c.count, list(c.axes), c.sent) for c in MADE_UP.collectives
    ]
    assert found["axes"]["tp"]["compiled"] == 63.5 * GIB and found["axes"]["fsdp+sp"]["compiled"] == 10 * GIB
    assert {axes: side["planned"] for axes, side in found["axes"].items()} == {
        t["axis"]: t["bytes"] for t in one["hides"]
    }
    assert found["kernels"] == {"forward": 32} and found["choices"] == ["attention ring"]


def test_without_aot_nothing_is_compiled(lwm: Run, trainer: StandIn) -> None:
    _, out, err = lwm("lwm-text", "--hardware", "v4:8x8x4", "--json")
    assert trainer.asked == [] and err == ""
    assert [one["compiled"] for one in json.loads(out)["stages"]] == [None] * 5


def test_a_stage_that_the_compiler_refuses_in_json(lwm: Run, trainer: StandIn) -> None:
    trainer.answers["1M"] = REFUSED
    code, out, _ = lwm("lwm-text", "--aot", "v4:8x8x4", "--stage", "1M", "--json")
    (one,) = json.loads(out)["stages"]
    assert code == 1 and one["fits"] and not one["compiled"]["fits"]
    assert one["compiled"]["problem"] == REFUSED.problem
    assert one["compiled"]["bytes"] is one["compiled"]["off"] is one["compiled"]["parts"] is None


def test_a_mesh_that_does_not_divide_is_not_compiled(lwm: Run, trainer: StandIn) -> None:
    words = ("--stage", "32K", "--stage", "1M", "-s", 'stages.0.mesh="1,-1,3,1"')
    code, out, _ = lwm("lwm-text", "--aot", "v4:8x8x4", *words, "--json")
    bad, good = json.loads(out)["stages"]
    assert code == 1 and trainer.asked == [("1M", "v4:8x8x4")]
    assert bad["compiled"] is None and "does not divide" in bad["problem"] and good["compiled"]["fits"]
    assert lwm("lwm-text", "--aot", "v4:8x8x4", *words)[1].count("refused: ") == 1


def test_a_trainer_that_cannot_is_refused_in_one_line(lwm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pipeline, "make_trainer", lambda self: object())
    code, out, err = lwm("lwm-text", "--aot", "v4:8x8x4")
    assert (code, out) == (2, "")
    assert err == (
        "error: --aot v4:8x8x4: trainer 'jax' cannot compile ahead of time; expected one that can, such as 'jax', or "
        "leave --aot out\n"
    )


def test_a_compiler_that_is_missing_is_refused_in_one_line(lwm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real trainer, in whose eyes libtpu is not there."""
    pytest.importorskip("lwm_jax_ring")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "libtpu" else find(name, *more)
    )
    code, out, err = lwm("lwm-text", "--aot", "v5p:8x8x4")
    assert code != 0 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and "needs libtpu, which is not installed" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--aot", "v5p-512"), "--aot 'v5p-512' is no topology; expected a TPU and its torus"),
        (("--aot", ""), "--aot '' is no topology"),
        (("--aot", "v5q:8x8x8"), "--aot 'v5q:8x8x8' is unknown"),
        (("--aot", "h100:8x8"), "--aot 'h100:8x8' is unknown"),
        (("--aot", "v5p:8x8x8", "--hardware", "v5p-512"), "is 256 x v5p and --aot v5p:8x8x8 is 512 x v5p"),
        (("--aot", "v4:8x8x4", "--hardware", "v5p-512"), "is 256 x v5p and --aot v4:8x8x4 is 256 x v4"),
        (("--aot", "v4:8x8x4", "--stage", "2M"), "--stage 2M: there is no such stage"),
    ],
)
def test_wrong_use_is_one_line(lwm: Run, trainer: StandIn, words: tuple[str, ...], said: str) -> None:
    code, out, err = lwm("lwm-text", *words)
    assert (code, out, trainer.asked) == (2, "", [])
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err


def test_a_models_folder_has_nothing_to_compile(lwm: Run, tmp_path: Any) -> None:
    values = {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "vocab_size": 32_000,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    code, out, err = lwm(str(tmp_path), "--to", "1048576", "--aot", "v5p:8x8x8")
    assert (code, out, err.count("\n")) == (2, "", 1) and "has no trainer to compile" in err


@pytest.mark.tpu_aot
@pytest.mark.tpu_pods
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_real_compiler_stands_beside_the_plan() -> None:
    """As docs/how-to/plan.md shows it, in a process of its own."""
    words = ["plan", "lwm-text", "--aot", "v4:8x8x4", "--stage", "32K", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from lwm_core.cli import main; sys.exit(main())", *words],
        env=os.environ | {"JAX_PLATFORMS": ""}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (one,) = json.loads(done.stdout)["stages"]
    assert abs(one["compiled"]["off"]) < 0.15
    stream = one["compiled"]["axes"]["tp"]
    assert stream["planned"] == pytest.approx(stream["compiled"], rel=0.05)
