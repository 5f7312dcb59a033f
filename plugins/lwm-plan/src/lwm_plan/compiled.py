"""``--aot``: what the devices' own compiler says of a stage's step, beside what is planned.

A trainer that compiles ahead (``lwm_core.protocols.CompilesAhead``) gives memory a device, and transfers by kind, type
and axes. The compiler may turn a gather or a sum into a ring of permutes, so that kinds cannot be held against the
plan, but what a device sends over an axis can.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lwm_core.errors import LwmError, UsageError
from lwm_core.protocols import CompiledStep, CompilesAhead, Stage
from lwm_plan.hardware import Machine
from lwm_plan.sources import Source
from lwm_plan.stage_plan import Evaluated, evaluate
from lwm_plan.transfers import by_axes

GIB = 2**30


def compile_stages(
    source: Source, machine: Machine, topology: str, names: Sequence[str], tell: Callable[[str], None]
) -> dict[str, CompiledStep]:
    """The compiled step of every stage, or of those called ``names``; stages whose mesh does not divide are left out.

    Args:
        topology: as the compiler names it; ``machine`` is the same devices.
        tell: of each stage when it is compiled, for that takes up to a minute; nothing where the first is refused.

    Raises:
        UsageError: the source has no trainer, or its trainer cannot compile ahead; the compiler knows no such topology.
        UnsupportedError: the compiler is not installed.
    """
    if source.make_trainer is None:
        raise UsageError(
            f"--aot {topology}: {source.name} is a model's folder, which has no trainer to compile; name a recipe"
        )
    trainer = source.make_trainer()
    if not isinstance(trainer, CompilesAhead):
        raise UsageError(
            f"--aot {topology}: trainer {source.job.trainer!r} cannot compile ahead of time; expected one that can, "
            "such as 'jax', or leave --aot out"
        )
    found = {}
    for stage in source.stages:
        if (not names or stage.name in names) and _divides(source, stage, machine):
            step = found[stage.name] = trainer.compile_ahead(stage, topology)
            tell(f"compiled {stage.name} for {topology} in {step.seconds:.0f} s")
    return found


def _divides(source: Source, stage: Stage, machine: Machine) -> bool:
    """Whether there is a step to compile; why not is the plan's to say."""
    try:
        evaluate(source.job, stage, machine)
    except LwmError:
        return False
    return True


def sides(found: Evaluated, step: CompiledStep) -> dict[str, tuple[int, int]]:
    """Bytes a device by part: (planned, compiled); the parts but the host's add up to each side's total."""
    memory = found.memory
    arguments = memory.parameters + memory.optimizer + memory.batch
    return {
        "parameters, optimizer and batch": (arguments, step.argument_bytes),
        "temporary": (memory.total - arguments - memory.program, step.temporary_bytes),
        "program and results": (memory.program, step.code_bytes + step.output_bytes),
        "in the host's memory": (memory.host, step.host_bytes),
    }


def sent(step: CompiledStep) -> dict[str, tuple[int, int]]:
    """Transfers by kind: (count, bytes of all), the most bytes first."""
    kinds: defaultdict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for one in step.collectives:
        count, size = kinds[one.kind]
        kinds[one.kind] = (count + one.count, size + one.count * one.bytes)
    return dict(sorted(kinds.items(), key=lambda kind: -kind[1][1]))


def over_axes(found: Evaluated, step: CompiledStep) -> dict[str, tuple[float, int]]:
    """Bytes that a device sends in a step by the axes that they go over: (planned, compiled); the planned axes first.

    Empty where the trainer does not tell axes.
    """
    theirs: defaultdict[str, int] = defaultdict(int)
    for one in step.collectives:
        if one.axes:
            theirs["+".join(one.axes)] += one.sent * one.count
    mine = by_axes(found.timing.transfers) if theirs else {}
    return {axes: (mine.get(axes, 0.0), theirs.get(axes, 0)) for axes in (*mine, *sorted(set(theirs) - set(mine)))}


def off(found: Evaluated, step: CompiledStep) -> float:
    """By what share of the compiled memory the plan is off."""
    return found.memory.total / step.bytes - 1


def lines(found: Evaluated, step: CompiledStep) -> list[str]:
    """Under the table: memory and transfers, planned beside compiled."""
    said = f"compiled for {step.devices} x {step.device_kind} in {step.seconds:.0f} s"
    if step.problem is not None:
        planned = f", where {_gib(found.memory.total)} are planned" + (" and fit" if found.fits else "")
        first, _, _ = step.problem.partition("\n")
        return [f"{said}: does not fit{planned}: {first}"]
    of = f" of {_gib(step.limit_bytes)}" if step.limit_bytes else ""
    parts = ", ".join(
        f"{name} {_gib(mine)} | {_gib(theirs)}" for name, (mine, theirs) in sides(found, step).items() if mine or theirs
    )
    kinds = ", ".join(f"{name} {_gib(size)} in {count:,}" for name, (count, size) in sent(step).items())
    planned = ", ".join(f"{one.what} over {one.axis} {_gib(one.bytes)}" for one in found.timing.transfers)
    axes = ", ".join(f"{name} {_gib(mine)} | {_gib(theirs)}" for name, (mine, theirs) in over_axes(found, step).items())
    return [
        f"{said}: {_gib(step.bytes)}{of}, planned {_gib(found.memory.total)} ({off(found, step):+.1%}); planned | "
        f"compiled: {parts}",
        f"transfers planned: {planned or 'none'}",
        f"transfers compiled: {kinds or 'none'}",
        *([f"sent over axes, planned | compiled: {axes}"] if axes else []),
    ]


def to_json(found: Evaluated | None, step: CompiledStep | None) -> dict[str, Any] | None:
    """``compiled`` of a stage; none where nothing was compiled. Memory and ``off`` are null where it does not fit."""
    if found is None or step is None:
        return None
    fits = step.problem is None
    facts: dict[str, Any] = {
        "topology": step.topology, "devices": step.devices, "device_kind": step.device_kind, "seconds": step.seconds,
        "fits": fits, "problem": step.problem, "limit_bytes": step.limit_bytes,
        "bytes": step.bytes if fits else None, "off": off(found, step) if fits else None,
        "parts": _sides_json(sides(found, step)) if fits else None,
        "sent": {kind: {"count": count, "bytes": size} for kind, (count, size) in sent(step).items()},
        "axes": _sides_json(over_axes(found, step)), "kernels": dict(step.kernels), "choices": list(step.choices),
        "collectives": [
            {"kind": one.kind, "type": one.type, "bytes": one.bytes, "count": one.count, "axes": list(one.axes),
             "sent": one.sent}
            for one in step.collectives
        ],
    }  # fmt: skip
    return facts


def _sides_json(parts: Mapping[str, tuple[float, int]]) -> dict[str, dict[str, float]]:
    return {name: {"planned": mine, "compiled": theirs} for name, (mine, theirs) in parts.items()}


def _gib(size: float) -> str:
    """Bytes in GiB, of small things in MiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 or not size else f"{size / 2**20:.1f} MiB"
