"""``strategy = "auto"``: the strategy that the mesh, the heads and the devices' rates make cheapest, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from jax.sharding import Mesh

from lwm_core.attention_cost import STRATEGIES, AttentionShape, choose_strategy
from lwm_core.errors import ShapeError
from lwm_core.protocols import AttentionAxes, AttentionChoice
from lwm_jax_ring.attention.options import AttentionOptions
from lwm_jax_ring.devices import DeviceRates, device_rates

GATHERED_SHARE = 1 / 16
"""Of a device's memory, what gathered keys and values may take; weights and activations need the rest."""

Divides = Callable[[AttentionOptions, int, int], object]
"""``(options, seq_len, world)``; raises ShapeError where the length does not divide."""


def resolve_strategy(
    options: AttentionOptions,
    shape: AttentionShape,
    mesh: Mesh,
    axes: AttentionAxes,
    divides: Divides,
    rates: DeviceRates | None = None,
) -> AttentionChoice:
    """``options`` with ``auto`` replaced; as they are where a strategy is named.

    Args:
        shape: one layer's attention on one group of data-parallel ranks, all heads. Where it does not say how long
            documents are, ``options.document`` does.
        rates: of a device of the mesh; looked up by its kind by default.

    Raises:
        UnsupportedError: the rates of the mesh's devices are not known.
        ShapeError: the length divides for no strategy.
    """
    if options.strategy != "auto":
        return AttentionChoice(options)
    world, split = mesh.shape[axes.seq], mesh.shape[axes.heads]
    if world == 1:
        return AttentionChoice(_with(options, "ring", 1), ("chose ring: one device holds the whole sequence",))
    rates = rates or device_rates(mesh.devices.flat[0], mesh.size)
    local = replace(
        shape,
        heads=shape.heads // split,
        kv_heads=max(1, shape.kv_heads // split),
        document=shape.document or options.document,
    )
    fitting, reasons = [], []
    for strategy in STRATEGIES:
        try:
            divides(_with(options, strategy, None), shape.seq_len, world)
        except ShapeError as error:
            reasons.append(f"{strategy}: {error}")
        else:
            fitting.append(strategy)
    if not fitting:
        raise ShapeError(f"jax-ring: strategy 'auto' finds none that fits: {'; '.join(reasons)}")
    memory = None if rates.memory is None else rates.memory * GATHERED_SHARE
    choice = choose_strategy(local, world, rates.machine, options.layout, memory, fitting)
    cost = choice.cost
    named = _with(options, cost.strategy, cost.inner)
    name = f"usp with inner = {cost.inner}" if cost.strategy == "usp" else cost.strategy
    told = f"documents of {local.document} tokens" if local.document else "one document a row"
    return AttentionChoice(named, (f"chose {name}, for {told}", *reasons, *choice.reasons))


def _with(options: AttentionOptions, strategy: str, inner: int | None) -> AttentionOptions:
    inner = inner if strategy == "usp" else None
    return options.model_copy(update={"strategy": strategy, "document": None, "inner": inner})
