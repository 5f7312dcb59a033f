"""Between the stacked parameters of the nnx model and the canonical names of ``lwm_core.model``.

Shapes: L layers; a linear kernel is ``[L, in, out]`` here and ``[out, in]`` a layer there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from math import prod
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lwm_core.errors import CheckpointError, LwmError
from lwm_core.model import ModelConfig, canonical_shapes

Path = tuple[str, ...]


def locate(name: str) -> tuple[Path, int | None, bool]:
    """Where a canonical parameter lives: path in the model, layer in the stack, and whether it is transposed."""
    parts = name.split(".")
    if name == "model.embed_tokens.weight":
        return ("embed_tokens",), None, False
    if name == "lm_head.weight":
        return ("lm_head",), None, False
    if name == "model.norm.weight":
        return ("norm", "weight"), None, False
    layer, inner, leaf = int(parts[2]), parts[3:-1], parts[-1]
    if "layernorm" in inner[-1]:
        return ("layers", *inner, "weight"), layer, False
    return ("layers", *inner, "kernel" if leaf == "weight" else "bias"), layer, leaf == "weight"


def iter_canonical(parameters: Mapping[Path, Any], config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """(canonical name, one unstacked float32 array), one at a time, and no second copy of it in memory.

    Where an array lies in several processes, all of them go through all of it.
    """
    for name in canonical_shapes(config):
        path, layer, turned = locate(name)
        array = _fetched(parameters[path], layer)
        yield name, array.T if turned else array
        del array  # before the next is made


_BLOCK = 2**20  # bytes that every device brings together at a time


def _fetched(leaf: Any, layer: int | None) -> np.ndarray:
    """The layer of a stack, or all of it, in memory of its own."""
    if not isinstance(leaf, jax.Array) or not isinstance(leaf.sharding, NamedSharding) or leaf.ndim < 2:
        return np.array(leaf if layer is None else leaf[layer], np.float32)
    mesh = leaf.sharding.mesh
    spec = P(*leaf.sharding.spec, *[None] * (leaf.ndim - len(leaf.sharding.spec)))
    if layer is not None and spec[0] is not None:
        raise LwmError(f"trainer 'jax': {spec} cuts the layers of a stack; expected its rows and columns alone")
    own = spec if layer is None else P(*spec[1:])
    found = np.empty(leaf.shape if layer is None else leaf.shape[1:], np.float32)
    names = (own[0],) if isinstance(own[0], str) else own[0] or ()
    ranks = prod(mesh.shape[name] for name in names)
    held = len(found) // ranks
    rows = min(held, max(1, _BLOCK // (ranks * found[:1].nbytes)))
    together = _together(mesh, spec, own, rows)
    for at in range(0, held, rows):
        start = min(at, held - rows)  # the last block begins where it still has all its rows
        blocks = np.asarray(together(leaf, np.int32(layer or 0), np.int32(start)))
        for rank in range(ranks):
            first = rank * held + start
            found[first : first + rows] = blocks[rank * rows : (rank + 1) * rows]
    return found


@cache
def _together(mesh: Mesh, spec: P, own: P, rows: int) -> Any:
    """The jitted (array, layer, start) → ``rows`` rows from ``start`` of each device's part, on every device."""

    def pick(part: jax.Array, layer: jax.Array, start: jax.Array) -> jax.Array:
        if len(spec) > len(own):
            part = lax.dynamic_index_in_dim(part, layer, keepdims=False)
        return lax.dynamic_slice_in_dim(part, start, rows)

    picked = jax.shard_map(pick, mesh=mesh, in_specs=(spec, P(), P()), out_specs=own)
    return jax.jit(picked, out_shardings=NamedSharding(mesh, P()))


def stack_canonical(given: Mapping[str, Any], config: ModelConfig, path: Path) -> np.ndarray:
    """The stacked float32 array at ``path``, read from canonical arrays one at a time.

    Raises:
        CheckpointError: a parameter is missing or has another shape.
    """
    found: list[np.ndarray] = []
    for name, shape in canonical_shapes(config).items():
        where, _, turned = locate(name)
        if where != path:
            continue
        if name not in given:
            raise CheckpointError(f"parameter {name!r} is missing; the model needs it with shape {shape}")
        array = np.asarray(given[name])
        if array.shape != shape:
            raise CheckpointError(f"parameter {name!r} has shape {array.shape}; the model needs {shape}")
        found.append((array.T if turned else array).astype(np.float32))
    return np.stack(found) if path[0] == "layers" else found[0]
