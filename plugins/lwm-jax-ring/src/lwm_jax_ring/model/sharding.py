"""Which mesh axes hold which dimension of a parameter, a batch and the residual stream.

LWM's rule (its ``get_partition_rules``): matrices that go out of the residual stream are split ``((fsdp, sp), tp)``,
those that come back ``(tp, (fsdp, sp))``, tables ``(tp, (fsdp, sp))``, norms are replicated. ``sp`` ranks hold
different tokens but the same parameters, so they share them out like ``fsdp``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

ROWS = ("dp", "fsdp")


def parameter_spec(path: tuple[str, ...], shape: Sequence[int], mesh: Mesh, over: tuple[str, ...]) -> P:
    """The spec of the parameter at ``path``; an axis that does not divide its dimension is left out there.

    Args:
        over: axes that share parameters out beside ``tp``; empty replicates them over all but ``tp``.
    """
    data = over or None
    if path[-1] in ("embed_tokens", "lm_head"):
        wanted: tuple[object, ...] = ("tp", data)
    elif path[-1] == "kernel":
        back = path[-2] in ("o_proj", "down_proj")
        wanted = (None, "tp", data) if back else (None, data, "tp")
    elif path[-1] == "bias":
        wanted = (None, "tp")
    else:
        wanted = ()
    fitted = []
    for size, axes in zip(shape, wanted, strict=False):
        names = (axes,) if isinstance(axes, str) else axes or ()
        ranks = prod(mesh.shape[name] for name in names)
        fitted.append(axes if ranks > 1 and size % ranks == 0 else None)
    return P(*fitted)


def parameter_sharding(path: tuple[str, ...], shape: Sequence[int], mesh: Mesh, over: tuple[str, ...]) -> NamedSharding:
    """:func:`parameter_spec` on the mesh."""
    return NamedSharding(mesh, parameter_spec(path, shape, mesh, over))


def gathered(shapes: Any, mesh: Mesh, over: tuple[str, ...]) -> Callable[[Any], Any]:
    """A function that brings one layer's parameters together over the axes that share them out; ``tp`` stays.

    Stated, so that it is done once a layer: left to the compiler, a loop over slices of tokens gathers in every round.
    Backward, gradients are scattered as they are summed.

    Args:
        shapes: nested dict of what the scan over layers gives, with the layer axis still there.
    """
    flat = traverse_util.flatten_dict(shapes)

    def specs(over: tuple[str, ...]) -> Any:
        whole = {path: parameter_spec(path, leaf.shape, mesh, over) for path, leaf in flat.items()}
        return traverse_util.unflatten_dict({path: NamedSharding(mesh, P(*spec[1:])) for path, spec in whole.items()})

    together, apart = specs(()), specs(over)

    @jax.custom_vjp
    def gather(parameters: Any) -> Any:
        return lax.with_sharding_constraint(parameters, together)

    gather.defvjp(
        lambda parameters: (gather(parameters), None),
        lambda _, gradients: (lax.with_sharding_constraint(gradients, apart),),
    )
    return gather


def place(array: Any, sharding: NamedSharding) -> jax.Array:
    """An array of the host, the same in every process, or of the devices, laid out so; each process puts its parts."""
    if sharding.is_fully_addressable or isinstance(array, jax.Array):
        return jax.device_put(array, sharding)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def place_rows(array: np.ndarray, sharding: NamedSharding, rank: int, world: int) -> jax.Array:
    """``world`` times as many rows as ``array`` ``[...,B,S]`` has, of which this process knows those of ``rank``."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    *front, rows, length = array.shape

    def part(index: tuple[slice, ...]) -> np.ndarray:
        begin, end, _ = index[-2].indices(world * rows)
        return array[(*index[:-2], slice(begin - rank * rows, end - rank * rows), index[-1])]

    return jax.make_array_from_callback((*front, world * rows, length), sharding, part)


def stream_sharding(mesh: Mesh, hidden_size: int, dims: int = 3) -> NamedSharding:
    """Of the residual stream ``[B,S,E]``, or of a slice ``[B,ranks,...,E]``: its columns over ``tp`` if they divide.

    Tensor-parallel ranks would else hold the same stream, which is what a layer keeps for its backward pass. Columns,
    not tokens as in arXiv 2205.05198: any slice of the tokens then stays even over the ranks.
    """
    columns = "tp" if hidden_size % mesh.shape["tp"] == 0 else None
    return NamedSharding(mesh, P(ROWS, "sp", *[None] * (dims - 3), columns))
