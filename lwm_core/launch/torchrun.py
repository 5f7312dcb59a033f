"""Lines to type: one for each host, and two for two terminals of one machine."""

from __future__ import annotations

from collections.abc import Sequence

from lwm_core.launch.fit import first_misfit
from lwm_core.launch.plan import Launch, line
from lwm_core.protocols.schedule import Stage

HERE = "127.0.0.1"
TRIED = (1, 2, 4)
"""Devices that a terminal may pretend to have."""


def files(launch: Launch, head: str, stages: Sequence[Stage]) -> dict[str, str]:
    """The two texts by name; ``head`` is the first host as the others reach it."""
    return {"hosts.sh": _hosts(launch, head), "two-terminals.sh": _terminals(launch, stages)}


def _hosts(launch: Launch, head: str) -> str:
    again = f"# To continue a run that was stopped, put in place of the lwm run ...: {line(launch.resume)}"
    environment = launch.environment
    if launch.framework == "torch":
        if launch.hosts == 1:
            return "\n".join([again, line([*launch.torchrun(None), *launch.begin], environment), ""])
        words = launch.torchrun(f"{head}:{launch.port}")
        return "\n".join([f"# The same line on each of {launch.hosts} hosts, in any order.", again,
                          line([*words, *launch.begin], environment), ""])  # fmt: skip
    if launch.hosts == 1:
        return "\n".join([again, line(launch.begin, environment), ""])
    lines = [f"# A line for each of {launch.hosts} hosts, in any order; the first host is the one named in all.", again]
    for rank in range(launch.hosts):
        place = process_environment(launch, head, rank, launch.hosts)
        lines += [f"# host {rank}", line(launch.begin, {**environment, **place})]
    return "\n".join([*lines, ""])


def process_environment(launch: Launch, head: str, rank: int, world: int) -> dict[str, str]:
    """What tells a process its place without torchrun.

    ``RANK`` and ``WORLD_SIZE`` are what the core reads, for any trainer. Of JAX's own, ``jax.distributed.initialize``
    reads the address alone from a variable (JAX 0.10); a trainer passes it the other two.
    """
    place = {"RANK": str(rank), "WORLD_SIZE": str(world)}
    if launch.framework == "jax":
        return {"JAX_COORDINATOR_ADDRESS": f"{head}:{launch.port}", **place}
    return {**place, "MASTER_ADDR": head, "MASTER_PORT": str(launch.port)}


def _terminals(launch: Launch, stages: Sequence[Stage]) -> str:
    tried = (1,) if launch.framework == "torch" else TRIED
    each = next((count for count in tried if first_misfit(stages, 2 * count) is None), None)
    if each is None:
        stage, why = first_misfit(stages, 2) or (stages[0], "")
        return f"# No lines for two terminals of one machine: stage {stage.name!r} does not fit:\n# {why}\n"
    lines = [f"# Two processes of one machine, a line in each of two terminals; {_devices(launch, each)}."]
    for rank in range(2):
        place, words = process_environment(launch, HERE, rank, 2), launch.run
        if launch.framework == "torch":
            place |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        if launch.framework == "jax":
            variables, more = launch.on_cpu(each)
            place, words = place | variables, (*words, *more)
        lines += [f"# terminal {rank + 1}", line(words, place)]
    return "\n".join([*lines, ""])


def _devices(launch: Launch, each: int) -> str:
    if launch.framework == "torch":
        return "each with a GPU of its own, or both on the CPU"
    return f"each with {each} of {2 * each} devices" + (", on the CPU" if launch.framework == "jax" else "")
