"""The KV cache: the prompt's part stays where prefill left it, spread over ``sp``; new tokens have a part of their own.

Every slot of the prompt carries its token's index, so that nothing infers order from a slot.

Shapes: L layers, B rows, P prompt slots, N new slots, K key-value heads, H query heads, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Cache(NamedTuple):
    """Keys and values of all layers."""

    prompt_k: jax.Array  # [L, B, P, K, D], in the layout's order
    prompt_v: jax.Array  # [L, B, P, K, D]
    prompt_index: jax.Array  # [B, P] int32: the token's index in its prompt; -1 in padding
    new_k: jax.Array  # [L, B, N, K, D]
    new_v: jax.Array  # [L, B, N, K, D]


def attend_cached(q: jax.Array, layer: tuple[jax.Array, ...], prompt_index: jax.Array, step: jax.Array) -> jax.Array:
    """One query a row over a layer's prompt and its new tokens up to and including ``step``.

    Args:
        q: ``[B,1,H,D]``.
        layer: prompt_k, prompt_v, new_k, new_v of one layer, without L.
        prompt_index: ``[B,P]``; slots of −1 are not seen.
        step: int32 scalar; new slots ``0..step`` are seen.

    Returns:
        ``[B,1,H,D]`` in q's dtype.
    """
    prompt_k, prompt_v, new_k, new_v = layer
    rows, _, heads, dim = q.shape
    kv_heads = prompt_k.shape[2]
    grouped = q.reshape(rows, kv_heads, heads // kv_heads, dim) * jnp.asarray(dim**-0.5, q.dtype)

    def scores(k: jax.Array, seen: jax.Array) -> jax.Array:
        s = jnp.einsum("bkgd,bskd->bkgs", grouped, k, preferred_element_type=jnp.float32)
        return jnp.where(seen[:, None, None], s, -jnp.inf)

    new_seen = jnp.broadcast_to(jnp.arange(new_k.shape[1]) <= step, (rows, new_k.shape[1]))
    old, new = scores(prompt_k, prompt_index >= 0), scores(new_k, new_seen)
    top = jnp.maximum(old.max(axis=-1), new.max(axis=-1))[..., None]
    old, new = jnp.exp(old - top), jnp.exp(new - top)
    total = old.sum(axis=-1) + new.sum(axis=-1)
    out = jnp.einsum("bkgs,bskd->bkgd", old.astype(q.dtype), prompt_v, preferred_element_type=jnp.float32)
    out = out + jnp.einsum("bkgs,bskd->bkgd", new.astype(q.dtype), new_v, preferred_element_type=jnp.float32)
    return (out / total[..., None]).astype(q.dtype).reshape(rows, 1, heads, dim)
