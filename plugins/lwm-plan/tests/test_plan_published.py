"""Planned beside what others have measured and published; the page shows the same figures, and how far off each is."""

from __future__ import annotations

from pathlib import Path

import pytest
from plan_cases import llama, stage

from lwm_core.model import ModelConfig, preset
from lwm_core.vocab import Vocabulary
from lwm_plan.hardware import read_machine
from lwm_plan.job import Job
from lwm_plan.stage_plan import evaluate

PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "plan.md"


def llama3() -> ModelConfig:
    """Llama 3 8B with its own vocabulary."""
    return preset("llama3-8b", Vocabulary(128_256))


def titan(tokens_per_second: float) -> float:
    """Seconds a step of 8 GPUs with 262,144 tokens in it, whatever their lengths."""
    return 262_144 / 8 / tokens_per_second


# What, machine, strategy, remat, tokens a row, rows, mesh, and what was published: seconds a step, or MFU below 1.
PUBLISHED = [
    ("Llama-2 7B, 32K, MaxText #4687", "v5p-128", "ring", "attention", 32_768, 4, "1,4,1,16", 0.285),
    ("Llama-2 7B, 32K, MaxText #4687", "v5p-128", "ulysses", "attention", 32_768, 4, "1,4,1,16", 0.522),
    *((f"Llama-3 8B, {length >> 10}K, MaxText #4893", "v5p-128", strategy, "attention", length, 1, "1,1,1,64", seconds)
      for length, of in ((65_536, (1.09, 1.42, 1.20)), (131_072, (2.98, 3.71, 2.93)), (262_144, (9.71, 10.78, 9.34)))
      for strategy, seconds in zip(("allgather", "ring", "usp"), of, strict=True)),
    *((f"Llama-3 8B, {length >> 10}K, torchtitan", "h100x8", "allgather", "full", length, 262_144 // length,
       f"1,{262_144 // length},1,{length // 32_768}", titan(rate))
      for length, rate in ((32_768, 3890), (65_536, 2540), (131_072, 1071), (262_144, 548))),
    ("Llama-2 7B, 512K, EasyContext", "a100x8", "ring", "offload", 524_288, 1, "1,1,1,8", 245.8),
    ("Qwen3 8B as Llama-3, 1M, TRL", "h100x8", "ring", "offload", 1_048_576, 1, "1,1,1,8", 380.0),
]  # fmt: skip


def told(published: tuple[str, str, str, str, int, int, str, float]) -> tuple[str, float]:
    """The page's row, and by how much the planned time is off."""
    what, name, strategy, remat, seq_len, rows, mesh, measured = published
    model = llama() if "Llama-2" in what else llama3()
    job = Job(model, strategy=strategy, remat=remat, inner=8 if strategy == "usp" else None)
    found = evaluate(job, stage(seq_len, rows, mesh), read_machine(name))
    if measured < 1:
        off, shown = measured / found.mfu - 1, f"MFU {found.mfu:.1%} | {measured:.1%}"
    else:
        off, shown = found.timing.seconds / measured - 1, f"{found.timing.seconds:.3g} s | {measured:.4g} s"
    return f"| {what} | {name} | {strategy} | {shown} | {off:+.0%} |", off


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda row: f"{row[0]}, {row[2]}")
def test_the_page_has_what_is_planned_beside_what_was_measured(
    published: tuple[str, str, str, str, int, int, str, float],
) -> None:
    row, _ = told(published)
    assert row in PAGE.read_text()


def test_how_far_off_is_what_the_page_says() -> None:
    """Nothing that others have published is a tenth faster than planned, and nothing is off by more than is stated."""
    found = [off for _, off in map(told, PUBLISHED)]
    assert max(found) < 0.1 and sum(off > 0 for off in found) == 2
    stated = f"the planned time is off by {min(found):.0%} to {max(found):+.0%}."
    assert stated in " ".join(PAGE.read_text().split())
