"""Between the stacked parameters of the nnx model and the canonical names of ``lwm_core.model``.

Shapes: L layers; a linear kernel is ``[L, in, out]`` here and ``[out, in]`` a layer there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lwm_core.errors import CheckpointError
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
    """(canonical name, one unstacked float32 array), one at a time."""
    for name in canonical_shapes(config):
        path, layer, turned = locate(name)
        leaf = parameters[path]
        if getattr(leaf, "is_fully_addressable", True):
            array = np.asarray(leaf if layer is None else leaf[layer])
        else:  # parts of it lie in other processes, which all come by here
            array = np.asarray(_whole(leaf.sharding.mesh)(leaf, layer))
        yield name, array.T if turned else array


@cache
def _whole(mesh: Mesh) -> Any:
    """The jitted (stack, layer) → that layer, or all of it, on every device of ``mesh``."""

    def pick(stack: jax.Array, layer: int | None) -> jax.Array:
        return stack if layer is None else lax.dynamic_index_in_dim(stack, layer, keepdims=False)

    return jax.jit(pick, out_shardings=NamedSharding(mesh, PartitionSpec()))


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
