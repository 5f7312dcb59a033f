"""The plan of a whole schedule, and what ``--json`` says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lwm_core.errors import LwmError
from lwm_core.protocols import CompiledStep, Stage
from lwm_plan import compiled as ahead
from lwm_plan.hardware import Machine
from lwm_plan.job import Job
from lwm_plan.sources import Source
from lwm_plan.stage_plan import Evaluated, evaluate, search, warnings
from lwm_plan.ways_out import WayOut, ways_out

WORDS = {
    "parameters": "the parameters", "optimizer": "the optimizer's moments", "gradients": "the gradients",
    "batch": "the batch", "program": "the program", "gathered": "a layer's gathered parameters",
    "logits": "the logits of a slice", "activations": "what the layers keep for the backward pass",
    "working": "a layer's backward pass", "attention": "what attention sends and gets",
}  # fmt: skip
"""The parts of memory, as people say them."""
SAME = 1.01
"""Within this factor of the best found, a recipe's own mesh is as good."""


@dataclass(frozen=True)
class StagePlan:
    """A stage on a machine.

    Args:
        job, stage: what was planned.
        chosen: by the recipe's mesh, or, where that is free, by the best; none where it does not divide.
        best: the fastest that was found and fits, attention by the cheapest strategy; none where nothing fits.
        why: what speaks for the best, in a line.
        problem: why the stage cannot run so; none where it fits.
        ways: out of the problem.
        warnings: what should be known besides.
        compiled: the step as the devices' compiler has made it; none where it was not asked.
    """

    job: Job
    stage: Stage
    chosen: Evaluated | None
    best: Evaluated | None
    why: str
    problem: str | None
    ways: tuple[WayOut, ...]
    warnings: tuple[str, ...]
    compiled: CompiledStep | None = None


def plan(
    source: Source, machine: Machine, names: tuple[str, ...] = (), compiled: Mapping[str, CompiledStep] | None = None
) -> tuple[StagePlan, ...]:
    """Every stage of ``source``, or those called ``names``, on ``machine``; ``compiled`` steps go by stage's name."""
    return tuple(
        replace(plan_stage(source.job, stage, machine, index, source.free), compiled=(compiled or {}).get(stage.name))
        for index, stage in enumerate(source.stages)
        if not names or stage.name in names
    )


def plan_stage(job: Job, stage: Stage, machine: Machine, index: int = 0, free: bool = False) -> StagePlan:
    """One stage; with ``free`` on the best mesh, else on its own."""
    found = search(job, stage, machine)
    problem, chosen = None, found
    if not free:
        try:
            chosen = evaluate(job, stage, machine)
        except LwmError as error:
            problem, chosen = str(error), None
    elif found is None:
        problem = (
            f"no mesh of {machine.devices} devices divides {stage.rows} rows of {stage.seq_len} tokens and "
            f"{job.model.num_heads} heads"
        )
    if chosen is not None:
        problem = _too_much(chosen)
    best = found if found is not None and found.fits else None
    ways = ways_out(job, stage, machine, index) if problem is not None else ()
    return StagePlan(job, stage, chosen, best, _why(chosen, best), problem, ways, warnings(job, stage, machine, chosen))


def _too_much(found: Evaluated) -> str | None:
    first = found.first_too_much()
    if first is None:
        return None
    name, size, left = first
    return (
        f"no room for {WORDS[name]}: {gib(size)} a device, where {gib(left)} are left of "
        f"{gib(found.machine.device.memory)}; all together need {gib(found.memory.total)}"
    )


def _why(chosen: Evaluated | None, best: Evaluated | None) -> str:
    """What the best is better by, and the attention that it was chosen with."""
    if best is None:
        return "nothing that was tried fits"
    alone = best.placed.sizes["sp"] == 1
    exposed = f"a layer's attention by {best.strategy}: {best.cost.compute:.3g} s, {best.cost.exposed:.3g} s exposed"
    reason = best.reasons[0] if alone else exposed
    if chosen is None or not chosen.fits:
        return f"the fastest that fits; {reason}"
    gain = chosen.timing.seconds / best.timing.seconds
    if gain < SAME:
        return f"no mesh that was tried is faster; {reason}"
    name, (before, after) = max(_seconds(chosen, best).items(), key=lambda part: part[1][0] - part[1][1])
    return f"{gain:.2f} times as fast: {name} takes {before:.3g} s, here {after:.3g}; {reason}"


def _seconds(*found: Evaluated) -> dict[str, list[float]]:
    """What a step of each is made of."""
    exposed = {t.what: 0.0 for one in found for t in one.timing.transfers}
    parts = {f"exposed {what}": [sum(t.exposed for t in one.timing.transfers if t.what == what) for one in found]
             for what in exposed}  # fmt: skip
    return {"arithmetic": [one.timing.matrices + one.timing.attention for one in found], **parts}


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def to_json(one: StagePlan) -> dict[str, Any]:
    """A stage's plain values; figures are null where its mesh does not divide."""
    chosen = one.chosen
    facts: dict[str, Any] = {
        "name": one.stage.name, "seq_len": one.stage.seq_len, "rows": one.stage.rows, "steps": one.stage.steps,
        "mesh": one.stage.mesh if chosen is None else chosen.mesh, "fits": chosen is not None and chosen.fits,
        "problem": one.problem,
        **(dict.fromkeys(FIGURES) if chosen is None else _figures(chosen)),
        "best": None if one.best is None else {
            "mesh": one.best.mesh, "strategy": one.best.strategy, "step_seconds": one.best.timing.seconds,
            "mfu": one.best.mfu, "bytes": one.best.memory.total, "why": one.why,
        },
        "ways_out": [
            {"change": way.change, "keys": list(way.keys), "hardware": way.machine.name, "mesh": way.found.mesh,
             "strategy": way.found.strategy, "bytes": way.found.memory.total,
             "step_seconds": way.found.timing.seconds}
            for way in one.ways
        ],
        "warnings": list(one.warnings), "compiled": ahead.to_json(chosen, one.compiled),
    }  # fmt: skip
    return facts


FIGURES = (
    "strategy", "bytes_per_device", "host_bytes", "flops", "executed_flops", "step_seconds", "mfu", "tokens_per_second",
    "days", "device_hours", "hides",
)  # fmt: skip
"""Of a stage whose mesh divides."""


def _figures(found: Evaluated) -> dict[str, Any]:
    values = (
        found.strategy, {**found.memory.parts, "total": found.memory.total}, found.memory.host,
        found.timing.model_flops, found.timing.executed_flops, found.timing.seconds, found.mfu,
        found.tokens_per_second, found.stage_seconds / 86400,
        found.stage_seconds * found.machine.devices / 3600,
        [{"axis": t.axis, "what": t.what, "bytes": t.bytes, "seconds": t.seconds, "exposed_seconds": t.exposed,
          "hides": t.hides} for t in found.timing.transfers],
    )  # fmt: skip
    return dict(zip(FIGURES, values, strict=True))
