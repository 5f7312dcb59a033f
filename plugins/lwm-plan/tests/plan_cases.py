"""A Llama and a stage to plan, and the plan of a compiled row."""

from __future__ import annotations

from typing import Any

from lwm_core.model import PRESETS, ModelConfig, preset
from lwm_core.protocols import Stage
from lwm_core.rope import RopeSpec
from lwm_core.vocab import Vocabulary
from lwm_plan.hardware import read_machine
from lwm_plan.job import Job
from lwm_plan.stage_plan import Evaluated, evaluate


def llama(vision: int = 0, name: str = "7b") -> ModelConfig:
    """Llama-2 7B, or another preset."""
    assert name in PRESETS
    return preset(name, Vocabulary(32_000, vision))


def stage(seq_len: int, rows: int, mesh: str, theta: float = 1e9, accumulate: int = 1) -> Stage:
    """Ten steps of so many rows."""
    batch = rows * seq_len
    return Stage(name="s", seq_len=seq_len, rope=RopeSpec(theta), tokens=10 * batch, batch_tokens=batch, lr=1e-4,
                 min_lr=1e-5, mesh=mesh, accumulate=accumulate)  # fmt: skip


def planned(row: dict[str, Any]) -> Evaluated:
    """The plan of a row of docs/benchmarks/aot.json, whose recipes all compute as ``lwm-text`` does."""
    job = Job(llama(8448 if row["group"] == "vision" else 0), remat=row["remat"], strategy="ring")
    return evaluate(job, stage(row["seq_len"], row["rows"], row["mesh"]), read_machine(row["topology"]))
