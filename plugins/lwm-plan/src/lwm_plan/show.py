"""A plan for people."""

from __future__ import annotations

from collections.abc import Sequence

from lwm_plan import compiled as ahead
from lwm_plan.hardware import DEVICES, EXAMPLES, Machine
from lwm_plan.plan import SAME, StagePlan, gib
from lwm_plan.sources import Source
from lwm_plan.ways_out import WayOut

COLUMNS = ("stage", "tokens a row", "mesh", "attention", "GiB a device", "fits", "s a step", "MFU", "tokens/s", "takes",
           "device-hours", "hides")  # fmt: skip
COMPILED = ("compiled", "off")
"""After the planned memory, where stages were compiled."""
LEFT = ("stage", "mesh", "attention", "fits", "hides")


def table(stages: Sequence[StagePlan], machine: Machine, source: Source) -> list[str]:
    """A line a stage, and what they come to."""
    device = machine.device
    head = (
        f"{source.name} on {machine.name}: {machine.devices} devices of {device.peak_flops / 1e12:g} TFLOP/s and "
        f"{gib(device.memory)}"
    )
    names: tuple[str, ...] = COLUMNS
    rows = [_row(one) for one in stages]
    if any(one.compiled is not None for one in stages):
        at = COLUMNS.index("GiB a device") + 1
        names = (*names[:at], *COMPILED, *names[at:])
        rows = [(*row[:at], *_compiled(one), *row[at:]) for row, one in zip(rows, stages, strict=True)]
    lines = [head, *columns(names, rows, LEFT)]
    whole = [one.chosen for one in stages if one.chosen is not None]
    if len(whole) == len(stages):
        seconds = sum(found.stage_seconds for found in whole)
        lines.append(f"all: {_span(seconds)}, {_hours(seconds * machine.devices)} device-hours")
    return lines


def _row(one: StagePlan) -> tuple[str, ...]:
    found = one.chosen
    start = (one.stage.name, f"{one.stage.seq_len:,}", one.stage.mesh if found is None else found.mesh)
    if found is None:
        return (*start, "", "", "no", *[""] * (len(COLUMNS) - 6))
    axes = ", ".join(f"{t.what} {'yes' if t.hides else 'no'}" for t in found.timing.transfers) or "nothing is sent"
    return (
        *start, found.strategy, f"{found.memory.total / 2**30:.2f}", "yes" if found.fits else "no",
        f"{found.timing.seconds:.3g}", f"{found.mfu:.1%}", f"{found.tokens_per_second:,.0f}",
        _span(found.stage_seconds), _hours(found.stage_seconds * found.machine.devices), axes,
    )  # fmt: skip


def _compiled(one: StagePlan) -> tuple[str, str]:
    """The compiler's memory, and by how much the planned is off."""
    if one.compiled is None or one.chosen is None:
        return "", ""
    if one.compiled.problem is not None:
        return "refused", ""
    return f"{one.compiled.bytes / 2**30:.2f}", f"{ahead.off(one.chosen, one.compiled):+.1%}"


def _span(seconds: float) -> str:
    """A time for people."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.0f}" if seconds >= 36_000 else f"{seconds / 3600:.2g}"


def below(one: StagePlan, source: Source) -> list[str]:
    """What is said of a stage under the table."""
    lines = []
    if one.problem is not None:
        lines.append(f"refused: {one.problem}")
        lines += [_way(way, source) for way in one.ways]
        if not one.ways:
            lines.append("no way out was found among meshes, remat, micro-batches, devices, machines and lengths")
    elif one.best is not None and one.chosen is not None and not source.free:
        faster = one.chosen.timing.seconds / one.best.timing.seconds >= SAME
        lines.append(f"best found: {one.best.mesh}, {one.best.strategy}; {one.why}" if faster else one.why)
    elif one.best is not None:
        lines.append(one.why)
    if one.chosen is not None and one.chosen.memory.host:
        lines.append(f"{gib(one.chosen.memory.host)} in the host's memory for each device")
    if one.chosen is not None and one.compiled is not None:
        lines += ahead.lines(one.chosen, one.compiled)
    return lines + [f"warning: {warning}" for warning in one.warnings]


def _way(way: WayOut, source: Source) -> str:
    found = way.found
    keys = " ".join(f"-s '{key}'" for key in way.keys) if source.literal and not source.free else ""
    return (
        f"way out: {way.change}, mesh {found.mesh}, {found.strategy}: {gib(found.memory.total)} a device, "
        f"{found.timing.seconds:.3g} s a step" + (f"  {keys}" if keys else "")
    )


def hardware() -> list[str]:
    """The devices that are known."""
    head = ("device", "bf16 TFLOP/s", "usable GiB", "HBM GB/s", "link GB/s", "network GB/s", "source")
    rows = [
        (one.name, f"{one.peak_flops / 1e12:g}", f"{one.memory / 2**30:.2f}", f"{one.memory_bandwidth / 1e9:g}",
         f"{one.link / 1e9:g}", f"{one.network / 1e9:g}" if one.island else "", one.source)
        for one in DEVICES.values()
    ]  # fmt: skip
    return [*columns(head, rows, ("device", "source")), f"names: {', '.join(EXAMPLES)}"]


def columns(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str]) -> list[str]:
    """Rows in columns as wide as need be."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if name in left else cell.rjust(width)
            for cell, width, name in zip(row, widths, head, strict=True)
        ).rstrip()
        for row in (head, *rows)
    ]
