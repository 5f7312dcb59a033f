"""What to change where a stage does not fit: every way that is offered has been tried and found to fit.

It must leave a tenth of the memory free, for the count of memory is right within 15% only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lwm_core.protocols import Stage
from lwm_plan.hardware import DEVICES, Machine
from lwm_plan.job import Job
from lwm_plan.stage_plan import NEAR, Evaluated, tried

OFFERED = 3
MOST_TIMES = 64
"""By how much the number of devices is raised at most."""


@dataclass(frozen=True)
class WayOut:
    """A change, what it turns the plan into, and what then comes out.

    Args:
        change: in words.
        keys: what to set in a recipe whose stages are its own, as ``-s`` takes it.
        job, stage, machine: with the change.
        found: with the mesh and strategy that go with it.
    """

    change: str
    keys: tuple[str, ...]
    job: Job
    stage: Stage
    machine: Machine
    found: Evaluated


def ways_out(job: Job, stage: Stage, machine: Machine, index: int = 0) -> tuple[WayOut, ...]:
    """The fastest :data:`OFFERED` meshes that fit; where none does, the first changes that fit, those first that change
    least of what is trained.

    Args:
        index: of the stage in the recipe, for the keys.
    """
    fitting = tried(job, stage, machine, NEAR)[:OFFERED]
    offered = [_way("another mesh", (), job, stage, one, index) for one in fitting]
    families = _families(job, stage, machine, index)
    while len(offered) < OFFERED and (family := next(families, None)) is not None:
        way = _first_that_fits(family, index)
        if way is not None:
            offered.append(way)
    return tuple(offered)


_Try = tuple[str, tuple[str, ...], Job, Stage, Machine]


def _families(job: Job, stage: Stage, machine: Machine, index: int) -> Iterator[list[_Try]]:
    """Kinds of change, each with its tries from the least to the most."""
    remats = [remat for remat in ("attention", "offload") if remat != job.remat]
    micros = _divisible(stage.accumulate, stage.rows)
    yield [(*_remat(job, remat), stage, machine) for remat in remats]
    yield [(*_micro(job, stage, times, index), machine) for times in micros]
    yield [_both(job, stage, remat, times, index, machine) for remat in remats for times in micros]
    yield [
        (f"{more.devices} devices ({more.name})", (), job, stage, more)
        for more in (machine.with_devices(machine.devices * times) for times in _doublings(1, MOST_TIMES))
    ]
    yield _larger(job, stage, machine, alike=True)
    yield [_shorter(job, stage, length, index, machine) for length in _halvings(stage.seq_len)]
    yield _larger(job, stage, machine, alike=False)


def _larger(job: Job, stage: Stage, machine: Machine, alike: bool) -> list[_Try]:
    """Devices with more memory, TPUs for TPUs and GPUs for GPUs if ``alike``, else the others; few devices first."""
    kinds = sorted(
        (
            one
            for one in DEVICES.values()
            if one.memory > machine.device.memory and alike == (bool(one.island) == bool(machine.device.island))
        ),
        key=lambda one: one.memory,
    )
    machines = [
        Machine("", kind, machine.devices).with_devices(machine.devices * times)
        for times in (1, *_doublings(1, MOST_TIMES))
        for kind in kinds
    ]
    return [(f"{one.devices} devices of more memory ({one.name})", (), job, stage, one) for one in machines]


def _remat(job: Job, remat: str) -> tuple[str, tuple[str, ...], Job]:
    return f"remat = {remat!r}", (f"trainer.remat={remat}",), replace(job, remat=remat)


def _micro(job: Job, stage: Stage, times: int, index: int) -> tuple[str, tuple[str, ...], Job, Stage]:
    keys = (f"stages.{index}.accumulate={times}",)
    return f"{times} micro-batches a step", keys, job, replace(stage, accumulate=times)


def _both(job: Job, stage: Stage, remat: str, times: int, index: int, machine: Machine) -> _Try:
    kept, first, cheaper = _remat(job, remat)
    said, second, _, dealt = _micro(job, stage, times, index)
    return f"{kept} and {said}", (*first, *second), cheaper, dealt, machine


def _shorter(job: Job, stage: Stage, length: int, index: int, machine: Machine) -> _Try:
    """Shorter rows, as many tokens a step, and as few rows a micro-batch as there can be."""
    rows = stage.batch_tokens // length
    times = max((stage.accumulate, *_divisible(stage.accumulate, rows)))
    keys = (f"stages.{index}.seq_len={length}", f"stages.{index}.accumulate={times}")
    short = replace(stage, seq_len=length, accumulate=times)
    return f"rows of {length} tokens, {times} micro-batches a step", keys, job, short, machine


def _first_that_fits(family: list[_Try], index: int) -> WayOut | None:
    for change, keys, job, stage, machine in family:
        fitting = tried(job, stage, machine, NEAR)
        if fitting:
            return _way(change, keys, job, stage, fitting[0], index)
    return None


def _way(change: str, keys: tuple[str, ...], job: Job, stage: Stage, found: Evaluated, index: int) -> WayOut:
    mesh = f'stages.{index}.mesh="{found.mesh}"'
    chosen = (*keys, mesh, *_attention_keys(job, found))
    return WayOut(change, chosen, job, replace(stage, mesh=found.mesh), found.machine, found)


def _attention_keys(job: Job, found: Evaluated) -> tuple[str, ...]:
    """What the recipe's attention must be set to where the search found another strategy."""
    same = job.strategy == found.cost.strategy and (job.strategy != "usp" or job.inner == found.cost.inner)
    if job.strategy == "auto" or same:
        return ()
    inner = (f"attention.inner={found.cost.inner}",) if found.cost.strategy == "usp" else ()
    return (f"attention.strategy={found.cost.strategy}", *inner)


def _doublings(start: int, most: int) -> list[int]:
    """2·start, 4·start … up to ``most``."""
    found = []
    while (start := 2 * start) <= most:
        found.append(start)
    return found


def _divisible(start: int, rows: int) -> list[int]:
    """2·start, 4·start … that divide ``rows``."""
    return [times for times in _doublings(start, rows) if rows % times == 0]


def _halvings(length: int) -> list[int]:
    """Half, a quarter … down to 1024 tokens, as long as they stay whole."""
    found = []
    while length % 2 == 0 and (length := length // 2) >= 1024:
        found.append(length)
    return found
