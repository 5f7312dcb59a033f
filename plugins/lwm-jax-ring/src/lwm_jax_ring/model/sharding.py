"""Which mesh axes hold which dimension of a parameter, a batch and the residual stream.

LWM's rule (its ``get_partition_rules``): matrices that go out of the residual stream are split ``((fsdp, sp), tp)``,
those that come back ``(tp, (fsdp, sp))``, tables ``(tp, (fsdp, sp))``, norms are replicated. ``sp`` ranks hold
different tokens but the same parameters, so they share them out like ``fsdp``.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

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


def stream_sharding(mesh: Mesh) -> NamedSharding:
    """Of the residual stream ``[B,S,E]``."""
    return NamedSharding(mesh, P(ROWS, "sp", None))
