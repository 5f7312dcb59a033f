"""``--aot``: what the devices' own compiler says of a stage's step, beside what is planned.

A trainer that compiles ahead (``lwm_core.protocols.CompilesAhead``) gives memory a device, and transfers by kind and
type. The compiler does not say which axis a transfer serves, and may turn a gather into a ring of permutes, so that the
planner's axes and its kinds stand beside each other; only gathers are held against each other.
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
from lwm_plan.timing import gathers

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


def gathered(found: Evaluated) -> float:
    """Bytes that the planned gathers give a device, as a compiler counts them: with the part that was there before.

    Of the stream's transfers some gather and some scatter; of the parameters' three, two gather.
    """
    size = {one.what: one.bytes for one in found.timing.transfers}
    tp, sharing, (gather, scatter) = found.placed.sizes["tp"], found.placed.sharing, gathers(found.placed)
    stream = size["stream"] * gather / (gather + scatter) * tp / (tp - 1) if tp > 1 else 0.0
    return stream + (size["parameters"] * 2 / 3 * sharing / (sharing - 1) if sharing > 1 else 0.0)


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
    axes = ", ".join(f"{one.what} over {one.axis} {_gib(one.bytes)}" for one in found.timing.transfers)
    return [
        f"{said}: {_gib(step.bytes)}{of}, planned {_gib(found.memory.total)} ({off(found, step):+.1%}); planned | "
        f"compiled: {parts}",
        f"transfers planned: {axes or 'none'}; gathers give {_gib(gathered(found))}",
        f"transfers compiled: {kinds or 'none'}",
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
        "planned_gathered_bytes": gathered(found), "kernels": dict(step.kernels), "choices": list(step.choices),
        "collectives": [
            {"kind": one.kind, "type": one.type, "bytes": one.bytes, "count": one.count} for one in step.collectives
        ],
    }  # fmt: skip
    return facts


def _sides_json(parts: Mapping[str, tuple[int, int]]) -> dict[str, dict[str, int]]:
    return {name: {"planned": mine, "compiled": theirs} for name, (mine, theirs) in parts.items()}


def _gib(size: float) -> str:
    """Bytes in GiB, of small things in MiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 or not size else f"{size / 2**20:.1f} MiB"
