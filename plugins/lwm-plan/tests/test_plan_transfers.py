"""What each axis sends, by hand and against what the TPU compiler made of the same steps (docs/benchmarks/aot.json)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from plan_cases import llama, planned, stage

from lwm_plan.hardware import read_machine
from lwm_plan.job import Job, place
from lwm_plan.stage_plan import evaluate, search
from lwm_plan.transfers import by_axes, parameters_bytes, slices, stream_bytes, stream_parts

DOCS = Path(__file__).parents[3] / "docs"


def test_bytes_over_an_axis_are_within_5_percent_of_the_compilers(compiled: list[dict[str, Any]]) -> None:
    """Every compiled step on every machine, and all axes of each together."""
    assert len(compiled) == 31 and all("axes" in row for row in compiled)
    for row in compiled:
        found = planned(row)
        mine, theirs = by_axes(found.timing.transfers), row["axes"]
        assert set(mine) <= set(theirs)
        assert sum(theirs[axis] for axis in set(theirs) - set(mine)) < 0.001 * sum(theirs.values())
        for axis, sent in mine.items():
            off = sent / theirs[axis] - 1
            print(f"{row['stage']:>10} {row['topology']:>10} {row['mesh']:>10} {row['remat']:>9} {axis:>8}: predicted "
                  f"{sent / 2**30:6.1f}, compiled {theirs[axis] / 2**30:6.1f} GiB, {off:+.1%}")  # fmt: skip
            assert abs(off) < 0.05, (row["stage"], row["topology"], axis, off)
        assert sum(mine.values()) == pytest.approx(sum(theirs.values()), rel=0.05)


def test_a_rings_bytes_are_the_compilers_to_two_thousandths(compiled: list[dict[str, Any]]) -> None:
    """Where parameters do not go over the same axis alone."""
    rows = [row for row in compiled if "fsdp+sp" in row["axes"]]
    assert len(rows) == 7
    for row in rows:
        assert by_axes(planned(row).timing.transfers)["sp"] == pytest.approx(row["axes"]["sp"], rel=2e-3)


def test_bytes_of_small_meshes_by_hand() -> None:
    """``debug``: 2 layers, E 256, F 256; 2 rows of 256 tokens, each on its own device."""
    job = Job(llama(name="debug"), token_chunk=64, loss_chunk=128)
    given = stage(256, 2, "1,2,2,1")
    found = place(job, given, 4)
    # Over 2 ranks of tp, halves of [256,256] in bfloat16: nine gathers and sums send one, of the rings one sends 3,
    # two 2 and one 1; the loss gathers twice and sums once in float32.
    half = 256 * 256 // 2
    assert stream_parts(found) == 9 + 8
    assert stream_bytes(found) == 2 * 17 * half * 2 + (2 * 2 + 4) * half
    # Over 2 of fsdp: half of a layer's half, twice in bfloat16 and in float32 four times, for there are four slices of
    # tokens; the head three times and once in each of two slices of the loss.
    layer, head = (4 * 256 * 256 + 3 * 256 * 256) // 2, 32_000 // 2 * 256
    assert parameters_bytes(found) == 2 * (2 * 2 + 4 * 4) * layer / 2 + 2 * (3 * 2 + 4) * head / 2


def test_micro_batches_send_as_often() -> None:
    job, machine = Job(llama(), strategy="ring"), read_machine("v4-512")
    once, twice = (
        evaluate(job, stage(1 << 18, rows, "1,16,8,2", accumulate=times), machine) for rows, times in ((16, 1), (32, 2))
    )
    for axis, sent in by_axes(once.timing.transfers).items():
        assert by_axes(twice.timing.transfers)[axis] == pytest.approx(2 * sent)


@pytest.mark.parametrize(
    ("tokens", "rows", "chunk", "count"),
    [(262_144, 1, 8192, 32), (32_768, 2, 8192, 8), (8192, 16, 8192, 16), (100, 1, 64, 2), (7, 1, 3, 7), (5, 9, 2, 5),
     (64, 1, 8192, 1), (64, 1, None, 1)],
)  # fmt: skip
def test_slices_are_equal_and_no_larger_than_they_may_be(tokens: int, rows: int, chunk: int | None, count: int) -> None:
    """As the trainer cuts them, checked against it where it is installed."""
    assert slices(tokens, rows, chunk) == count
    llama_ = pytest.importorskip("lwm_jax_ring.model.llama")
    if chunk is not None:
        import numpy as np

        assert llama_.Chunks(chunk, 1, 1).split(np.zeros((rows, tokens, 1))).shape[0] == count


def test_the_compiled_mesh_of_a_million_tokens_is_the_planners_own(compiled: list[dict[str, Any]]) -> None:
    """It was compiled because the plan picks it: faster than the paper's, and the compiler agrees that it fits."""
    (row,) = (row for row in compiled if row["group"] == "best")
    (paper,) = (row for row in compiled if (row["group"], row["stage"], row["remat"]) == ("text", "1M", "attention"))
    machine = read_machine("v4-512")
    best = search(Job(llama(), strategy="ring"), stage(row["seq_len"], row["rows"], "1,-1,1,1"), machine)
    assert best is not None and (best.mesh, best.strategy) == (row["mesh"], "ring")
    assert best.mfu > planned(paper).mfu
    assert row["problem"] is None and row["bytes"] < row["limit_bytes"]
    assert best.memory.total == pytest.approx(row["bytes"], rel=0.15)
    page = " ".join((DOCS / "benchmarks" / "aot.md").read_text().split())
    assert (
        f"finds `{best.mesh}`, with {best.mfu:.1%} MFU where the paper's `{planned(paper).mesh}` has "
        f"{planned(paper).mfu:.1%} by the same count. The compiler takes it: {row['bytes'] / 2**30:.2f} GiB a device, "
        f"planned {best.memory.total / 2**30:.2f}."
    ) in page
