"""Planned beside what others have measured and published: a bound, and not far off; the page shows the same figures."""

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


# What, machine, strategy, remat, tokens a row, rows, mesh, seconds a step that were published.
PUBLISHED = [
    ("Llama-2 7B, 32K, MaxText #4687", "v5p-128", "ring", "attention", 32_768, 4, "1,4,1,16", None, 0.285),
    ("Llama-2 7B, 32K, MaxText #4687", "v5p-128", "ulysses", "attention", 32_768, 4, "1,4,1,16", None, 0.522),
    ("Llama-3 8B, 64K, MaxText #4893", "v5p-128", "allgather", "attention", 65_536, 1, "1,1,1,64", 1.09, None),
    ("Llama-3 8B, 256K, MaxText #4893", "v5p-128", "allgather", "attention", 262_144, 1, "1,1,1,64", 9.71, None),
    ("Llama-3 8B, 256K, MaxText #4893", "v5p-128", "ring", "attention", 262_144, 1, "1,1,1,64", 10.78, None),
    ("Llama-2 7B, 512K, EasyContext", "a100x8", "ring", "offload", 524_288, 1, "1,1,1,8", 245.8, None),
    ("Qwen3 8B as Llama-3, 1M, TRL", "h100x8", "ring", "offload", 1_048_576, 1, "1,1,1,8", 380.0, None),
]


@pytest.mark.parametrize(("what", "name", "strategy", "remat", "seq_len", "rows", "mesh", "seconds", "mfu"), PUBLISHED)
def test_a_plan_is_a_bound_and_not_far_off(
    what: str, name: str, strategy: str, remat: str, seq_len: int, rows: int, mesh: str, seconds: float | None,
    mfu: float | None,
) -> None:  # fmt: skip
    model = llama() if "Llama-2" in what else llama3()
    found = evaluate(Job(model, strategy=strategy, remat=remat), stage(seq_len, rows, mesh), read_machine(name))
    if mfu is not None:
        assert 0.85 < found.mfu / mfu < 2
        shown = f"MFU {found.mfu:.1%} | {mfu:.1%}"
    else:
        assert seconds is not None
        assert 0.4 < found.timing.seconds / seconds < 1.15
        shown = f"{found.timing.seconds:.3g} s | {seconds:.4g} s"
    assert f"| {what} | {name} | {strategy} | {shown} |" in PAGE.read_text()
