"""Attention of new tokens over what is in the cache, wherever it lies; one device's part, inside ``shard_map``.

Each rank of ``sp`` holds a part of every row. *pass-Q* brings the queries to the keys: all ranks' queries are gathered,
each rank lets them see its own part, and the results are summed on their way back. *pass-KV* sends the parts round the
ranks, past the queries. Whichever moves fewer bytes is taken (arXiv 2411.01783). A few tokens are on all ranks anyway:
each rank lets them see its part, and only their results travel.

Shapes: B rows, c new tokens (of this rank, or the few that all have), H query heads, K key-value heads, G = H / K,
D head dim, T slots of a rank; n ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lwm_jax_ring.attention.blocks import Keys, Queries
from lwm_jax_ring.attention.kernels.contract import Kernel, capped
from lwm_jax_ring.generate.cache import PAGE, LayerCache, part

BLOCK = 1024
"""Slots of the cache that a chunk's queries see at a time, at most."""

AT_ONCE, FEW_BLOCK = 8192, 4096
"""Up to how many slots a few queries see at once, and so many at a time of more."""

AXIS = "sp"


def room(slots: int) -> int:
    """Slots that a rank's cache has so that it holds ``slots``: whole pages, and few different sizes."""
    return few_sizes(slots, PAGE if slots <= AT_ONCE else FEW_BLOCK)


def block_of(slots: int) -> int:
    """Slots that a chunk's queries see at a time of a cache of ``slots``: up to :data:`BLOCK`, and a divisor."""
    pages = slots // PAGE
    return next(size for size in range(BLOCK // PAGE, 0, -1) if pages % size == 0) * PAGE


def rounded(value: int, unit: int) -> int:
    """``value``, rounded up to a multiple of ``unit``."""
    return -(-value // unit) * unit


def few_sizes(value: int, unit: int) -> int:
    """``value``, rounded up to a multiple of ``unit``, and beyond 8 of them to one of 8 sizes between 2^n and 2^(n+1).

    What is compiled for a size then serves many, and at most an eighth is wasted.
    """
    units = -(-value // unit)
    step = 1 << max(0, (units - 1).bit_length() - 4) if units > 8 else 1
    return rounded(units, step) * unit


@dataclass(frozen=True)
class Reading:
    """What is static about it.

    Args:
        kernel: of the attention's options; lets queries see a block.
        ranks: n.
        softcap: of the attention's options, for the few tokens that need no kernel.
    """

    kernel: Kernel
    ranks: int
    softcap: float | None


def merged(out: jax.Array, lse: jax.Array, other: jax.Array, other_lse: jax.Array) -> jax.Array:
    """Attention over both of two sets of keys, from out ``[B,c,H,D]`` and lse ``[B,c,H]`` over each; float32."""
    top = jnp.maximum(lse, other_lse)
    base = jnp.where(top == -jnp.inf, 0.0, top)
    one, two = jnp.exp(lse - base), jnp.exp(other_lse - base)
    total = one + two
    total = jnp.where(total > 0, total, 1.0)
    return out * (one / total)[..., None] + other.astype(jnp.float32) * (two / total)[..., None]


def over_cache(
    q: jax.Array, layer: LayerCache, held: jax.Array, fill: jax.Array, how: Reading
) -> tuple[jax.Array, jax.Array]:
    """out ``[B,c,H,D]`` and lse ``[B,c,H]``, float32, of this rank's ``q [B,c,H,D]`` over the pages of all ranks.

    Args:
        held: ``[B,T]``; slots of 0 are not seen.
        fill: ``[1]`` int32, the slots that are begun.
    """
    tokens, heads, dim = q.shape[1:]
    kv_heads, slots = layer.k.slots.shape[1:3]
    moved, kept = tokens * heads * dim * (q.itemsize + 4), 2 * slots * kv_heads * dim * layer.k.slots.itemsize
    if how.ranks == 1 or moved <= kept:
        return _pass_q(q, layer, held, fill, how)
    return _pass_kv(q, layer, held, fill, how)


def _pass_q(
    q: jax.Array, layer: LayerCache, held: jax.Array, fill: jax.Array, how: Reading
) -> tuple[jax.Array, jax.Array]:
    if how.ranks == 1:
        return _over_own(q, layer, held, fill, how)
    out, lse = _over_own(lax.all_gather(q, AXIS, axis=1, tiled=True), layer, held, fill, how)
    top = lax.pmax(lse, AXIS)
    weights = jnp.exp(lse - jnp.where(top == -jnp.inf, 0.0, top))
    total = lax.psum_scatter(weights, AXIS, scatter_dimension=1, tiled=True)
    out = lax.psum_scatter(out * weights[..., None], AXIS, scatter_dimension=1, tiled=True)
    top = lax.dynamic_slice_in_dim(top, lax.axis_index(AXIS) * q.shape[1], q.shape[1], axis=1)
    some = jnp.where(total > 0, total, 1.0)
    return out / some[..., None], jnp.where(total > 0, top + jnp.log(some), -jnp.inf)


def _over_own(
    q: jax.Array, layer: LayerCache, held: jax.Array, fill: jax.Array, how: Reading
) -> tuple[jax.Array, jax.Array]:
    queries = _queries(q, layer, how)
    state = _absorb(how.kernel.start(queries), queries, layer, held, fill, how, q.dtype)
    return how.kernel.finish(state, q.shape[1])


def _pass_kv(
    q: jax.Array, layer: LayerCache, held: jax.Array, fill: jax.Array, how: Reading
) -> tuple[jax.Array, jax.Array]:
    rounds = [(source, (source + 1) % how.ranks) for source in range(how.ranks)]
    queries = _queries(q, layer, how)

    def hop(carry: Any, _: None) -> tuple[Any, None]:
        state, here = carry
        coming = lax.ppermute(here, AXIS, rounds)  # under way while the queries see what is here
        return (_absorb(state, queries, *here, how, q.dtype), coming), None

    begun = (how.kernel.start(queries), (layer, held, fill))
    (state, here), _ = lax.scan(hop, begun, length=how.ranks - 1)
    return how.kernel.finish(_absorb(state, queries, *here, how, q.dtype), q.shape[1])


def _queries(q: jax.Array, layer: LayerCache, how: Reading) -> Any:
    rows, tokens = q.shape[:2]
    last = jnp.full((1, tokens), BLOCK, jnp.int32)
    everything = Queries(jnp.zeros_like(last), last, jnp.ones((rows, tokens), jnp.int32))
    return how.kernel.queries(q, everything, layer.k.slots.shape[1])


def _absorb(
    state: Any, queries: Any, layer: LayerCache, held: jax.Array, fill: jax.Array, how: Reading, dtype: Any
) -> Any:
    block = block_of(layer.k.slots.shape[2])

    def see(number: jax.Array, state: Any) -> Any:
        at = number * block
        k, v = (jnp.swapaxes(part(pages, at, block, dtype), 1, 2) for pages in (layer.k, layer.v))
        keys = Keys(lax.iota(jnp.int32, block), lax.dynamic_slice_in_dim(held, at, block, axis=1))
        return how.kernel.absorb(state, queries, k, v, keys)

    return lax.fori_loop(0, -(-fill[0] // block), see, state)


class Running(NamedTuple):
    """Softmax under way, rows of a group side by side: R = G·c."""

    out: jax.Array  # [B,K,R,D] float32, the numerator
    top: jax.Array  # [B,K,R] float32
    total: jax.Array  # [B,K,R] float32


def few_over_all(
    q: jax.Array, layer: LayerCache, held: jax.Array, fill: jax.Array, tail_seen: jax.Array, how: Reading
) -> jax.Array:
    """``[B,c,H,D]`` in q's dtype: a few tokens, the same on all ranks, over all pages and the tail.

    Args:
        q: ``[B,c,H,D]``; its own keys are in the tail.
        held, fill: see :func:`over_cache`.
        tail_seen: ``[B,c,PAGE]`` bool.
    """
    rows, tokens, heads, dim = q.shape
    kv_heads, slots = layer.k.slots.shape[1:3]
    grouped = q.reshape(rows, tokens, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(rows, kv_heads, -1, dim) * jnp.asarray(dim**-0.5, q.dtype)
    block = slots if slots <= AT_ONCE else FEW_BLOCK

    def see(number: jax.Array | int, state: Running) -> Running:
        at = number * block
        seen = held if block == slots else lax.dynamic_slice_in_dim(held, at, block, axis=1)
        k, v = (part(pages, at, block, q.dtype) for pages in (layer.k, layer.v))
        return _see(state, grouped, k, v, seen[:, None, None] > 0, how.softcap)

    nothing = jnp.full(grouped.shape[:-1], -jnp.inf)
    state = Running(jnp.zeros(grouped.shape, jnp.float32), nothing, jnp.zeros_like(nothing))
    state = see(0, state) if block == slots else lax.fori_loop(0, -(-fill[0] // block), see, state)
    if how.ranks > 1:
        top = lax.pmax(state.top, AXIS)
        weight = jnp.exp(state.top - jnp.where(top == -jnp.inf, 0.0, top))
        out, total = lax.psum((state.out * weight[..., None], state.total * weight), AXIS)
        state = Running(out, top, total)
    own = jnp.tile(tail_seen, (1, heads // kv_heads, 1))[:, None]
    state = _see(state, grouped, layer.tail_k.astype(q.dtype), layer.tail_v.astype(q.dtype), own, how.softcap)
    out = state.out / jnp.where(state.total > 0, state.total, 1.0)[..., None]
    out = out.reshape(rows, kv_heads, heads // kv_heads, tokens, dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(q.shape).astype(q.dtype)


def _see(state: Running, q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, softcap: float | None) -> Running:
    """After ``q [B,K,R,D]`` has seen ``k, v [B,K,t,D]`` where ``seen [B,1,R or 1,t]``."""
    # Keys first: on CPUs XLA multiplies a tall matrix by a few columns faster than a few rows by its transpose.
    scores = jnp.swapaxes(jnp.einsum("bktd,bkrd->bktr", k, q, preferred_element_type=jnp.float32), 2, 3)
    scores = jnp.where(seen, capped(scores, softcap), -jnp.inf)
    top = jnp.maximum(state.top, scores.max(axis=-1))
    base = jnp.where(top == -jnp.inf, 0.0, top)
    weights, old = jnp.exp(scores - base[..., None]), jnp.exp(state.top - base)
    new = jnp.einsum("bkrt,bktd->bkrd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return Running(state.out * old[..., None] + new, top, state.total * old + weights.sum(axis=-1))
