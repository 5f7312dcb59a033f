"""The device mesh by its four axes: ``dp`` and ``fsdp`` carry rows, ``tp`` heads, ``sp`` the sequence."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from lwm_core.errors import ShapeError

MESH_AXES = ("dp", "fsdp", "tp", "sp")


def parse_mesh(text: str) -> dict[str, int]:
    """Read ``"1,-1,4,1"`` or ``"fsdp:-1,tp:4"`` into sizes of all four axes; axes not named are 1.

    Raises:
        ValueError: an axis is unknown, given twice, not an integer, zero, or more than one is -1.
    """
    parts = [part.strip() for part in text.split(",")]
    named = any(":" in part for part in parts)
    if not named and len(parts) != len(MESH_AXES):
        raise ValueError(f"mesh {text!r} has {len(parts)} sizes; expected four: dp,fsdp,tp,sp")
    sizes = dict.fromkeys(MESH_AXES, 1)
    seen: set[str] = set()
    for position, part in enumerate(parts):
        axis, _, size_text = part.partition(":") if named else (MESH_AXES[position], "", part)
        if axis not in sizes or axis in seen:
            raise ValueError(f"mesh {text!r}: axis {axis!r} is unknown or given twice; the axes are dp,fsdp,tp,sp")
        seen.add(axis)
        try:
            size = int(size_text)
        except ValueError:
            raise ValueError(f"mesh {text!r}: size of {axis} is {size_text!r}; expected an integer or -1") from None
        if size == 0 or size < -1:
            raise ValueError(f"mesh {text!r}: size of {axis} is {size}; expected a positive integer or -1")
        sizes[axis] = size
    if sum(size == -1 for size in sizes.values()) > 1:
        raise ValueError(f"mesh {text!r} has more than one -1; at most one axis can take what is left")
    return sizes


def resolve_mesh(text: str, devices: int) -> dict[str, int]:
    """The sizes of the four axes on ``devices`` devices, -1 filled in.

    Raises:
        ShapeError: the sizes do not multiply to the number of devices.
    """
    sizes = parse_mesh(text)
    known = prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values():
        if devices % known:
            raise ShapeError(
                f"mesh {text!r} does not fit {devices} devices: {known} does not divide {devices}; "
                "change the sizes so that their product divides the devices"
            )
        return {axis: devices // known if size == -1 else size for axis, size in sizes.items()}
    if known != devices:
        raise ShapeError(
            f"mesh {text!r} needs {known} devices, but {devices} are here; "
            "write -1 for one axis to take what is left, or change the number of devices"
        )
    return sizes


def data_ranks(sizes: Mapping[str, int]) -> int:
    """How many slices a step's rows are cut into: dp × fsdp."""
    return sizes["dp"] * sizes["fsdp"]
