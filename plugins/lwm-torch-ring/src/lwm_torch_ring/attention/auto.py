"""``strategy = "auto"`` and ``kernel = "auto"``: what the mesh, the heads and the devices make cheapest, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from lwm_core.attention_cost import STRATEGIES, AttentionShape, choose_strategy
from lwm_core.errors import ShapeError
from lwm_core.protocols import AttentionAxes, AttentionChoice
from lwm_torch_ring.attention.options import AttentionOptions
from lwm_torch_ring.attention.strategies import choose_kernel
from lwm_torch_ring.devices import DeviceRates, device_rates

GATHERED_SHARE = 1 / 16
"""Of a device's memory, what gathered keys and values may take; weights and activations need the rest."""

Divides = Callable[[AttentionOptions, int, int], object]
"""``(options, seq_len, world)``; raises ShapeError where the length does not divide."""


def resolve(
    options: AttentionOptions, shape: AttentionShape, mesh: Any | None, axes: AttentionAxes, divides: Divides
) -> AttentionChoice:
    """``options`` with every ``auto`` replaced; those that are named stay.

    Every rank calls it at the same time. Raises as :func:`resolve_strategy` does, and UnsupportedError for a named
    kernel that cannot run on the mesh's devices.
    """
    sizes = axis_sizes(mesh)
    kind = "cpu" if mesh is None else mesh.device_type
    device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
    dtype = torch.float32 if shape.element_bytes == 4 else torch.bfloat16
    kernel, why = choose_kernel(options, device, dtype, shape.head_dim)
    choice = resolve_strategy(
        options, shape, sizes.get(axes.seq, 1), sizes.get(axes.heads, 1), divides, lambda: device_rates(device)
    )
    return AttentionChoice(choice.options.model_copy(update={"kernel": kernel}), (*choice.reasons, *why))


def axis_sizes(mesh: Any | None) -> dict[str, int]:
    """The sizes of a ``DeviceMesh``'s axes by name; none: one device."""
    names = () if mesh is None else mesh.mesh_dim_names or ()
    return {name: mesh.size(place) for place, name in enumerate(names)}


def resolve_strategy(
    options: AttentionOptions,
    shape: AttentionShape,
    world: int,
    split: int,
    divides: Divides,
    rates: Callable[[], DeviceRates],
) -> AttentionChoice:
    """``options`` with strategy ``auto`` replaced; as they are where one is named.

    Args:
        shape: one layer's attention on one group of data-parallel ranks, all heads.
        world, split: processes that share the sequence, and heads.
        rates: of a device; asked for only where it matters.

    Raises:
        UnsupportedError: the rates of the devices are not known.
        ShapeError: the length divides for no strategy.
    """
    if options.strategy != "auto":
        return AttentionChoice(options)
    if world == 1:
        return AttentionChoice(_with(options, "ring", 1), ("chose ring: one device holds the whole sequence",))
    known = rates()
    local = replace(shape, heads=shape.heads // split, kv_heads=max(1, shape.kv_heads // split))
    fitting, reasons = [], []
    for strategy in STRATEGIES:
        try:
            divides(_with(options, strategy, None), shape.seq_len, world)
        except ShapeError as error:
            reasons.append(f"{strategy}: {error}")
        else:
            fitting.append(strategy)
    if not fitting:
        raise ShapeError(f"torch-ring: strategy 'auto' finds none that fits: {'; '.join(reasons)}")
    memory = None if known.memory is None else known.memory * GATHERED_SHARE
    choice = choose_strategy(local, world, known.machine, options.layout, memory, fitting)
    cost = choice.cost
    name = f"usp with inner = {cost.inner}" if cost.strategy == "usp" else cost.strategy
    return AttentionChoice(_with(options, cost.strategy, cost.inner), (f"chose {name}", *reasons, *choice.reasons))


def _with(options: AttentionOptions, strategy: str, inner: int | None) -> AttentionOptions:
    return options.model_copy(update={"strategy": strategy, "inner": inner if strategy == "usp" else None})
