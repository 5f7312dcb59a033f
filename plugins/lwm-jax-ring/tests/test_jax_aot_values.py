"""The values that a refused program is explained by: a device's part of each, through loops and ``shard_map``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lwm_jax_ring.aot.values import largest_values


def sharding(*axes: str | None) -> NamedSharding:
    """On eight devices of one axis ``sp``."""
    return NamedSharding(Mesh(np.array(jax.devices()[:8]), ("sp",)), P(*axes))


def test_what_layers_keep_is_the_largest() -> None:
    """Five layers' inputs, kept for the backward pass, each dealt to eight devices by its tokens."""

    def loss(x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return lax.with_sharding_constraint(jnp.sin(x) * 2, sharding(None, "sp")), None

        return lax.scan(layer, x, None, length=5)[0].sum()

    x = jax.ShapeDtypeStruct((2, 64, 128), jnp.float32, sharding=sharding(None, "sp"))
    step = jax.jit(jax.grad(loss)).trace(x)
    first, *rest = largest_values(step.jaxpr.jaxpr, [x.sharding])
    assert (first.part, first.whole, first.dtype) == ((5, 2, 8, 128), (5, 2, 64, 128), "float32")
    assert first.bytes == 5 * 2 * 8 * 128 * 4 and "by scan" in str(first)
    assert "float32[5, 2, 8, 128] of [5, 2, 64, 128]" in str(first)
    assert (2, 8, 128) in {value.part for value in rest}


def test_inside_shard_map_shapes_are_a_devices_own() -> None:
    def local(x: jax.Array) -> jax.Array:
        return lax.all_gather(x, "sp", axis=0, tiled=True).max(0, keepdims=True)

    def step(x: jax.Array) -> Any:
        mapped = jax.shard_map(local, mesh=sharding().mesh, in_specs=P("sp"), out_specs=P("sp"), check_vma=False)
        return mapped(x)

    traced = jax.jit(step).trace(jax.ShapeDtypeStruct((64, 16), jnp.bfloat16))
    values = largest_values(traced.jaxpr.jaxpr)
    assert (values[0].part, values[0].made_by) == ((64, 16), "all_gather")
    assert ((1, 16), (8, 16)) in {(value.part, value.whole) for value in values}


def test_a_value_without_a_layout_is_not_guessed_at() -> None:
    traced = jax.jit(lambda x: (x @ x.T, x + 1)).trace(jax.ShapeDtypeStruct((64, 16), jnp.float32))
    assert largest_values(traced.jaxpr.jaxpr) == []
    given = largest_values(traced.jaxpr.jaxpr, [sharding("sp")])
    assert [(value.part, value.made_by) for value in given] == [((8, 16), "add")]
