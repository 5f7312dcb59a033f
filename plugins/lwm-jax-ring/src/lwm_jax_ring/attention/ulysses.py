"""Strategies ``ulysses`` and ``usp``: ranks exchange heads for tokens, so that each sees more of the sequence at once.

DeepSpeed Ulysses (arXiv 2309.14509): an all-to-all gives each device every token of a few heads, attention needs
nothing from the others, and a second all-to-all gives the tokens back. It moves less than a ring but needs a head a
device. USP (arXiv 2405.07719) does it among ``inner`` neighbours, which then are one rank of a ring among the rest.

Shapes, of one device: B batch, C tokens, H query heads, K key-value heads, D head dim; n = ``spec.inner``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from lwm_core.attention_cost import repeated_kv_heads
from lwm_jax_ring.attention.differentiable import Attention
from lwm_jax_ring.attention.ring import RING
from lwm_jax_ring.attention.spec import AttentionSpec


def repeat_kv_heads(q: jax.Array, k: jax.Array, v: jax.Array, ranks: int) -> tuple[jax.Array, jax.Array]:
    """k and v with their heads repeated where ``ranks`` does not divide them.

    Raises:
        UnsupportedError: the query heads do not divide over the ranks, or the copies over the query heads.
    """
    heads, kv_heads = q.shape[2], k.shape[2]
    times = repeated_kv_heads(heads, kv_heads, ranks) // kv_heads
    if times == 1:
        return k, v

    def copies(x: jax.Array) -> jax.Array:
        # By way of float32, in which the gradients of the copies are added up then.
        return jnp.repeat(x.astype(jnp.float32), times, axis=2).astype(x.dtype)

    return copies(k), copies(v)


def _neighbours(spec: AttentionSpec) -> list[list[int]] | None:
    """The devices of each rank; none where that is all of them."""
    if spec.world == 1:
        return None
    return [[rank * spec.inner + i for i in range(spec.inner)] for rank in range(spec.world)]


def _to_heads(x: jax.Array, spec: AttentionSpec) -> jax.Array:
    """``[B,C,N,D]`` → ``[B,n·C,N/n,D]``."""
    groups = _neighbours(spec)
    return lax.all_to_all(x, spec.axis, split_axis=2, concat_axis=1, tiled=True, axis_index_groups=groups)


def _to_tokens(x: jax.Array, spec: AttentionSpec) -> jax.Array:
    """The inverse of :func:`_to_heads`."""
    groups = _neighbours(spec)
    return lax.all_to_all(x, spec.axis, split_axis=1, concat_axis=2, tiled=True, axis_index_groups=groups)


def _exchanged(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, spec: AttentionSpec
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    k, v = repeat_kv_heads(q, k, v, spec.inner)
    if segments is not None:
        segments = lax.all_gather(segments, spec.axis, axis=1, tiled=True, axis_index_groups=_neighbours(spec))
    return _to_heads(q, spec), _to_heads(k, spec), _to_heads(v, spec), segments


def _attention(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, spec: AttentionSpec) -> jax.Array:
    return _to_tokens(RING.attention(*_exchanged(q, k, v, segments, spec), spec), spec)


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, spec: AttentionSpec
) -> tuple[jax.Array, jax.Array]:
    out, lse = RING.forward(*_exchanged(q, k, v, segments, spec), spec)
    return _to_tokens(out, spec), _to_tokens(lse[..., None], spec)[..., 0]


ULYSSES = Attention(_attention, _forward)
"""Raises UnsupportedError where the heads do not divide over ``spec.inner``."""
