"""Whether a schedule's meshes fit the hosts."""

from __future__ import annotations

from collections.abc import Sequence

from lwm_core.errors import ShapeError
from lwm_core.mesh import data_ranks, resolve_mesh
from lwm_core.protocols.schedule import Stage


def first_misfit(stages: Sequence[Stage], devices: int) -> tuple[Stage, str] | None:
    """The first stage that cannot run on so many devices, and why; none where all can.

    Lengths are left to the attention, whose layout is its own affair; ``lwm run`` asks it before it starts.
    """
    for stage in stages:
        try:
            ranks = data_ranks(resolve_mesh(stage.mesh, devices))
        except ValueError as error:  # ShapeError is one
            return stage, str(error)
        if (stage.rows // stage.accumulate) % ranks:
            return stage, (
                f"mesh {stage.mesh!r}: {stage.rows} rows a step in {stage.accumulate} micro-batches do not divide over "
                f"dp × fsdp = {ranks}; change batch_tokens, accumulate or mesh"
            )
    return None


def check_fit(stages: Sequence[Stage], hosts: int, devices_per_host: int) -> None:
    """Hold every stage's mesh and rows against the hosts.

    Raises:
        ShapeError: one does not fit; the line names stage, mesh, and hosts × devices.
    """
    misfit = first_misfit(stages, hosts * devices_per_host)
    if misfit is not None:
        stage, why = misfit
        counts = f"{hosts} host{'s' * (hosts > 1)} × {devices_per_host} device{'s' * (devices_per_host > 1)}"
        raise ShapeError(f"stage {stage.name!r} on {counts}: {why}")
