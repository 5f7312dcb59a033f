"""``lwm aot`` as far as the core goes: what a trainer must be, and how a compiled step is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lwm_core.cli.aot import describe
from lwm_core.protocols import Collective, CompiledStep

GIB = 2**30


def test_a_trainer_that_cannot_is_named(lwm: Any, small: Callable[..., Path]) -> None:
    done = lwm("aot", str(small()), "--topology", "v5p:2x2x1")
    assert done.returncode == 2
    assert done.stderr == "error: trainer 'standin' cannot compile ahead of time\n"


def test_a_stage_that_is_not_there_is_told_before_anything_is_compiled(lwm: Any, small: Callable[..., Path]) -> None:
    done = lwm("aot", str(small()), "--topology", "v5p:2x2x1", "--stage", "longer")
    assert done.returncode == 2
    assert done.stderr == "error: --stage longer: there is no such stage; expected one of short, long\n"


def test_a_step_is_told_in_lines() -> None:
    collectives = tuple(
        Collective("all-gather", f"f32[{n}]", n * GIB, 2, ("tp", "sp") * (n < 8)) for n in range(8, 0, -1)
    )
    step = CompiledStep(
        "v5p:2x2x1", 4, "TPU v5", 12.3, limit_bytes=90 * GIB, parameter_bytes=3 * GIB, argument_bytes=9 * GIB,
        temporary_bytes=10 * GIB, output_bytes=1000, code_bytes=2**20, host_bytes=GIB, collectives=collectives,
        kernels={"forward": 64}, choices=("attention auto: ring",),
    )  # fmt: skip
    lines = describe(step)
    assert lines[0] == "4 x TPU v5 (v5p:2x2x1), compiled in 12 s"
    assert lines[1].startswith("19.00 GiB of 90.00 GiB a device: 9.00 GiB parameters, optimizer and batch, 10.00 GiB")
    assert lines[2] == "3.00 GiB of that are parameters, and as much the gradients among the temporary"
    assert lines[3] == "1.00 GiB in the host's memory for each device"
    assert lines[4].strip() == "2 x all-gather of 8.00 GiB, f32[8]"
    assert lines[5].strip() == "2 x all-gather of 7.00 GiB over tp+sp, f32[7]"
    assert lines[10].strip() == "4 x smaller transfers, 6.00 GiB in all"  # two of 2 GiB and two of 1 GiB
    assert lines[11].strip() == "64 x kernel forward"
    assert lines[12] == "attention auto: ring"


def test_a_step_that_does_not_fit_is_told_in_the_compilers_words() -> None:
    step = CompiledStep("v5p:2x2x1", 4, "TPU v5", 5.0, problem="ran out\nlargest: 3G")
    assert describe(step) == ["4 x TPU v5 (v5p:2x2x1), compiled in 5 s", "does not fit", "  ran out", "  largest: 3G"]
