"""Which axes of the mesh a compiled transfer serves, and how many bytes of it a device sends.

A compiled program numbers devices as the mesh does, its last axis fastest, and states of each collective the groups of
devices that take part. The axes along which the devices of a group differ are those that it serves.

Shapes: N devices, G groups, n devices of a group.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod

import numpy as np
from numpy.typing import NDArray

from lwm_jax_ring.aot.program_text import Instruction, ProgramTextError

_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
_LISTED = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_COUNTED = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[((?:'[^']+'=\d+,?)+)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^{}]*)\}"
)


def groups(one: Instruction, devices: int) -> NDArray[np.int64]:
    """Devices that a collective joins, ``[G,n]``; of a permute ``[G,2]``: who sends and who is sent to.

    Raises:
        ProgramTextError: they are written in a way that this reader does not know.
    """
    if found := _PAIRS.search(one.rest):
        return np.array([_numbers(pair) for pair in re.findall(r"\{([\d,]*)\}", found[1])], np.int64).reshape(-1, 2)
    if found := _LISTED.search(one.rest):
        listed = [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", found[1])]
        return np.array(listed, np.int64) if any(listed) else np.arange(devices)[None]
    if found := _COUNTED.search(one.rest):
        return _counted(devices, found[2], found[3]).reshape(_numbers(found[1]))
    if found := _MESH.search(one.rest):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        inside = re.findall(r"'([^']+)'", found[4])
        order = [list(sizes).index(name) for name in [*(name for name in sizes if name not in inside), *inside]]
        numbered = _counted(devices, found[2] or str(devices), found[3]).reshape(tuple(sizes.values()))
        return numbered.transpose(order).reshape(-1, prod(sizes[name] for name in inside))
    raise ProgramTextError(f"compiled program: the devices of {one.name!r} cannot be read: {one.rest[:120]}")


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word]


def _counted(devices: int, dims: str, order: str | None) -> NDArray[np.int64]:
    """All devices in order, laid out in ``dims``, whose axes then change places."""
    numbered = np.arange(devices).reshape(_numbers(dims))
    return numbered if order is None else numbered.transpose(_numbers(order))


def served(joined: NDArray[np.int64], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Axes of a mesh of ``sizes`` along which the devices of a group ``[G,n]`` differ, in the mesh's order."""
    places = np.unravel_index(joined, tuple(sizes.values()))
    return tuple(axis for axis, at in zip(sizes, places, strict=True) if (at != at[:, :1]).any())


def sent_bytes(kind: str, given: int, joined: NDArray[np.int64], devices: int) -> int:
    """Bytes that a device sends in one collective, by the fewest that its kind can do with.

    Args:
        kind: such as ``all-gather``.
        given: bytes that the device gives.
        joined: its groups, ``[G,n]``.
        devices: N, of which those that no pair of a permute names send nothing.
    """
    ranks = joined.shape[1]
    if kind == "collective-permute":
        return round(given * len(joined) / devices)
    if kind == "all-gather":
        return given * (ranks - 1)
    return round(given * (2 if kind == "all-reduce" else 1) * (ranks - 1) / ranks)
