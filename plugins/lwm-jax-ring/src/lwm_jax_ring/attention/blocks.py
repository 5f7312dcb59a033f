"""What a kernel is told about one block of tokens: which they are, and what each may see.

Shapes: B batch, C tokens of a rank or a chunk; R is B where documents make rows differ, else 1.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lwm_core.attention import AttentionMask
from lwm_core.layout import SequenceLayout


class Queries(NamedTuple):
    """The query side of a mask: query c sees keys whose natural index lies in ``[low, high]``, of its own segment."""

    low: jax.Array  # [R, C] int32
    high: jax.Array  # [R, C] int32
    segments: jax.Array | None  # [B, C] int32, 0 sees nothing


class Keys(NamedTuple):
    """The key side of a mask."""

    index: jax.Array  # [C] int32, natural index; -1 is never seen
    segments: jax.Array | None  # [B, C] int32


def natural_indices(layout: SequenceLayout, seq_len: int, rank: jax.Array | int) -> jax.Array:
    """``[S/world]`` int32: the natural indices of a rank's slots, for a rank that is only known when the program runs.

    The traced counterpart of :meth:`SequenceLayout.rank_indices`; no array of the whole length is made.
    """
    count = seq_len // layout.world
    slots = lax.iota(jnp.int32, count)
    if layout.world == 1 or layout.kind == "contiguous":
        return rank * count + slots
    if layout.kind == "striped":
        return rank + layout.world * slots
    half = count // 2
    late = (2 * layout.world - 1 - rank) * half + slots - half
    return jnp.where(slots < half, rank * half + slots, late).astype(jnp.int32)


def to_natural(x: jax.Array, layout: SequenceLayout) -> jax.Array:
    """``[..., S]`` in the layout's order → natural order, by reshapes alone."""
    world, length = layout.world, x.shape[-1]
    if world == 1 or layout.kind == "contiguous":
        return x
    if layout.kind == "striped":
        return jnp.swapaxes(x.reshape(*x.shape[:-1], world, -1), -1, -2).reshape(x.shape)
    halves = x.reshape(*x.shape[:-1], world, 2, length // (2 * world))
    return jnp.concatenate([halves[..., 0, :], jnp.flip(halves[..., 1, :], axis=-2)], axis=-2).reshape(x.shape)


def document_bounds(segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First and last index of each token's run of equal segment ids; ``[B, S]`` in natural order."""
    length = segments.shape[-1]
    index = jnp.broadcast_to(lax.iota(jnp.int32, length), segments.shape)
    change = jnp.concatenate(
        [jnp.ones_like(segments[..., :1], dtype=bool), segments[..., 1:] != segments[..., :-1]], axis=-1
    )
    ends = jnp.concatenate([change[..., 1:], jnp.ones_like(change[..., :1])], axis=-1)
    first = lax.cummax(jnp.where(change, index, 0), axis=segments.ndim - 1)
    last = lax.cummin(jnp.where(ends, index, length - 1), axis=segments.ndim - 1, reverse=True)
    return first, last


def query_bounds(
    mask: AttentionMask, index: jax.Array, seq_len: int, first: jax.Array | None = None, last: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """``low`` and ``high`` of the queries with natural indices ``index [C]``: the rule of ``lwm_core.attention``.

    ``first`` and ``last`` ``[B, C]`` are the bounds of each query's document; only block-causal masks look at them.
    """
    index = index[None]
    if mask.kind == "full":
        return jnp.zeros_like(index), jnp.full_like(index, seq_len - 1)
    high = index
    if mask.block is not None:
        start = jnp.zeros_like(index) if first is None else first
        end = jnp.full_like(index, seq_len - 1) if last is None else last
        high = jnp.minimum(start + ((index - start) // mask.block + 1) * mask.block - 1, end)
    low = jnp.zeros_like(high) if mask.window is None else jnp.maximum(high - (mask.window - 1), 0)
    return low, high
