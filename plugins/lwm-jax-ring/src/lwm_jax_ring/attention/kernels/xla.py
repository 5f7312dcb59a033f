"""The block kernel in plain XLA operations: runs on every device, and is what other kernels are checked against.

A rank's queries and keys are cut into chunks; each pair of chunks is skipped, computed whole, or computed with a mask,
as their indices and segment ids say when the program runs. No array larger than a pair of chunks is ever made.
Accumulators are float32 whatever the inputs (online softmax: Rabe and Staats, arXiv 2112.05682).

Shapes: B batch, K key-value heads, G query heads a key-value head, D head dim; c query chunk, t key chunk;
Nq, Nk numbers of chunks. Queries of a group lie side by side as rows: G·c rows a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lwm_jax_ring.attention.blocks import Keys, Queries
from lwm_jax_ring.attention.kernels.contract import capped, precision, row_sums

SKIP, WHOLE, MASKED = 0, 1, 2


class State(NamedTuple):
    """Running softmax of all query chunks: numerator, row maximum, denominator; float32."""

    out: jax.Array  # [Nq, B, K, G·c, D]
    top: jax.Array  # [Nq, B, K, G·c]
    total: jax.Array  # [Nq, B, K, G·c]


def chunk_length(run: int, limit: int) -> int:
    """Length of a chunk for runs of ``run`` consecutive tokens: a divisor of the run near ``limit``, else ``limit``."""
    if run <= limit:
        return run
    divisor = next(size for size in range(limit, 0, -1) if run % size == 0)
    return divisor if 4 * divisor >= limit else limit


def split_queries(x: jax.Array, kv_heads: int, chunk: int) -> jax.Array:
    """``[B, C, H, D]`` → ``[Nq, B, K, G·c, D]``, padded with zeros to whole chunks."""
    batch, length, heads, dim = x.shape
    count = -(-length // chunk)
    x = jnp.pad(x, ((0, 0), (0, count * chunk - length), (0, 0), (0, 0)))
    x = x.reshape(batch, count, chunk, kv_heads, heads // kv_heads, dim)
    return x.transpose(1, 0, 3, 4, 2, 5).reshape(count, batch, kv_heads, -1, dim)


def join_queries(x: jax.Array, length: int, chunk: int) -> jax.Array:
    """The inverse of :func:`split_queries` for ``[Nq, B, K, G·c, D]``."""
    count, batch, kv_heads, rows, dim = x.shape
    x = x.reshape(count, batch, kv_heads, rows // chunk, chunk, dim).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(batch, count * chunk, -1, dim)[:, :length]


def split_keys(x: jax.Array, chunk: int) -> jax.Array:
    """``[B, C, K, D]`` → ``[Nk, B, K, t, D]``, padded with zeros to whole chunks."""
    batch, length, heads, dim = x.shape
    count = -(-length // chunk)
    x = jnp.pad(x, ((0, 0), (0, count * chunk - length), (0, 0), (0, 0)))
    return x.reshape(batch, count, chunk, heads, dim).transpose(1, 0, 3, 2, 4)


def join_keys(x: jax.Array, length: int) -> jax.Array:
    """The inverse of :func:`split_keys`."""
    count, batch, heads, chunk, dim = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(batch, count * chunk, heads, dim)[:, :length]


def _chunked(x: jax.Array | None, chunk: int, fill: int) -> jax.Array | None:
    """``[..., C]`` → ``[N, ..., chunk]``, padded with ``fill``."""
    if x is None:
        return None
    count = -(-x.shape[-1] // chunk)
    pad = [(0, 0)] * (x.ndim - 1) + [(0, count * chunk - x.shape[-1])]
    x = jnp.pad(x, pad, constant_values=fill).reshape(*x.shape[:-1], count, chunk)
    return jnp.moveaxis(x, -2, 0)


def split_query_mask(queries: Queries, chunk: int) -> Queries:
    """Every field by chunks, padding seeing nothing (its high is below every index)."""
    return Queries(
        _chunked(queries.low, chunk, 0), _chunked(queries.high, chunk, -2), _chunked(queries.segments, chunk, 0)
    )


def split_key_mask(keys: Keys, chunk: int) -> Keys:
    """Every field by chunks, padding seen by nobody."""
    return Keys(_chunked(keys.index, chunk, -1), _chunked(keys.segments, chunk, 0))


def classify(queries: Queries, keys: Keys) -> jax.Array:
    """SKIP, WHOLE or MASKED for one pair of chunks, from the extremes of its indices and segment ids; int32 scalar."""
    key_low, key_high = keys.index.min(), keys.index.max()
    meets = (key_low <= queries.high.max()) & (key_high >= queries.low.min())
    whole = (key_high <= queries.high.min()) & (key_low >= queries.low.max()) & (key_low >= 0)
    if queries.segments is not None:
        q_low, q_high = queries.segments.min(axis=-1), queries.segments.max(axis=-1)
        k_low, k_high = keys.segments.min(axis=-1), keys.segments.max(axis=-1)
        meets &= ((k_low <= q_high) & (k_high >= q_low) & (q_high > 0) & (k_high > 0)).any()
        whole &= ((q_low == q_high) & (k_low == k_high) & (q_low == k_low) & (q_low > 0)).all()
    return jnp.where(meets, jnp.where(whole, WHOLE, MASKED), SKIP).astype(jnp.int32)


def _seen(queries: Queries, keys: Keys, groups: int) -> jax.Array:
    """``[R or B, 1, G·c, t]`` bool."""
    index = keys.index
    seen = (queries.low[:, :, None] <= index) & (index <= queries.high[:, :, None]) & (index >= 0)
    if queries.segments is not None:
        same = queries.segments[:, :, None] == keys.segments[:, None, :]
        seen = seen & same & (queries.segments != 0)[:, :, None]
    return jnp.tile(seen, (1, groups, 1))[:, None]


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Batched matrix product over leading [B, K], float32 result; float32 inputs are multiplied in full precision."""
    return jnp.matmul(a, b, precision=precision(a), preferred_element_type=jnp.float32)


def start(split_q: jax.Array) -> State:
    """The state before any key: numerator 0, maximum −inf, denominator 0."""
    rows = split_q.shape[:-1]
    zeros = jnp.zeros(rows, jnp.float32)
    return State(jnp.zeros(split_q.shape, jnp.float32), jnp.full_like(zeros, -jnp.inf), zeros)


def _absorb(state: State, scores: jax.Array, v: jax.Array, guard: bool) -> State:
    """Add one pair's scores ``[B, K, G·c, t]`` to a chunk's state; ``guard`` where a row may have seen nothing yet."""
    top = jnp.maximum(state.top, scores.max(axis=-1))
    base = jnp.where(top == -jnp.inf, 0.0, top) if guard else top
    weights = jnp.exp(scores - base[..., None])
    old = jnp.exp(state.top - base)
    total = state.total * old + weights.sum(axis=-1)
    out = state.out * old[..., None] + _dot(weights.astype(v.dtype), v)
    return State(out, top, total)


class Prepared(NamedTuple):
    """What all query chunks bring to the forward pass."""

    q: jax.Array  # [Nq, B, K, G·c, D], multiplied by the softmax scale
    mask: Queries  # by chunks


def forward_block(
    state: State, queries: Prepared, k: jax.Array, v: jax.Array, keys: Keys, chunk: int, softcap: float | None
) -> State:
    """Let all query chunks see one rank's keys.

    Args:
        state, queries: of all query chunks.
        k, v: ``[B, C, K, D]`` of the rank whose keys these are.
        keys: their mask side, not yet by chunks.
        chunk: key chunk t.
    """
    k_turned = jnp.swapaxes(split_keys(k, chunk), -1, -2)
    v_split, key_mask = split_keys(v, chunk), split_key_mask(keys, chunk)

    def per_query(_, x):  # type: ignore[no-untyped-def]
        chunk_state, q, q_mask = x
        groups = q.shape[-2] // q_mask.low.shape[-1]

        def per_key(carry, y):  # type: ignore[no-untyped-def]
            k_t, v_t, k_mask = y

            def whole(s):  # type: ignore[no-untyped-def]
                return _absorb(s, capped(_dot(q, k_t), softcap), v_t, guard=False)

            def masked(s):  # type: ignore[no-untyped-def]
                scores = jnp.where(_seen(q_mask, k_mask, groups), capped(_dot(q, k_t), softcap), -jnp.inf)
                return _absorb(s, scores, v_t, guard=True)

            return lax.switch(classify(q_mask, k_mask), (lambda s: s, whole, masked), carry), None

        return None, lax.scan(per_key, chunk_state, (k_turned, v_split, key_mask))[0]

    return lax.scan(per_query, None, (state, queries.q, queries.mask))[1]


def finish(state: State) -> tuple[jax.Array, jax.Array]:
    """out ``[Nq, B, K, G·c, D]`` float32 and natural-log lse ``[Nq, B, K, G·c]``: 0 and −inf where nothing was seen."""
    seen = state.total > 0
    total = jnp.where(seen, state.total, 1.0)
    lse = jnp.where(seen, state.top + jnp.log(total), -jnp.inf)
    return jnp.where(seen[..., None], state.out / total[..., None], 0.0), lse


class Saved(NamedTuple):
    """What a chunk of queries brings to the backward pass."""

    q: jax.Array  # [Nq, B, K, G·c, D], multiplied by the softmax scale
    dout: jax.Array  # [Nq, B, K, G·c, D]
    lse: jax.Array  # [Nq, B, K, G·c]; +inf where nothing was seen, so that its weights are 0
    delta: jax.Array  # [Nq, B, K, G·c], sum of out · dout
    mask: Queries  # by chunks


def backward_block(
    dq: jax.Array, saved: Saved, k: jax.Array, v: jax.Array, keys: Keys, chunk: int, softcap: float | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Add one rank's keys' share to dq; and the dk and dv of those keys, ``[Nk, B, K, t, D]`` float32.

    Args:
        dq: ``[Nq, B, K, G·c, D]`` float32, with respect to the unscaled query but for the softmax scale.
    """
    k_split, v_split, key_mask = split_keys(k, chunk), split_keys(v, chunk), split_key_mask(keys, chunk)
    zeros = jnp.zeros_like(k_split, dtype=jnp.float32)

    def per_key(dq_all, x):  # type: ignore[no-untyped-def]
        dk_t, dv_t, k_t, v_t, k_mask = x
        k_turned, v_turned = jnp.swapaxes(k_t, -1, -2), jnp.swapaxes(v_t, -1, -2)

        def per_query(carry, y):  # type: ignore[no-untyped-def]
            dq_c, s = y
            groups = s.q.shape[-2] // s.mask.low.shape[-1]

            def pair(args, mask_pair):  # type: ignore[no-untyped-def]
                dq_c, dk_c, dv_c = args
                scores = capped(_dot(s.q, k_turned), softcap)
                slope = 1.0 if softcap is None else 1.0 - jnp.square(scores / softcap)
                if mask_pair:
                    scores = jnp.where(_seen(s.mask, k_mask, groups), scores, -jnp.inf)
                weights = jnp.exp(scores - s.lse[..., None])
                dscores = (weights * slope * (_dot(s.dout, v_turned) - s.delta[..., None])).astype(k_t.dtype)
                dv_c += _dot(jnp.swapaxes(weights.astype(k_t.dtype), -1, -2), s.dout)
                dk_c += _dot(jnp.swapaxes(dscores, -1, -2), s.q)
                return dq_c + _dot(dscores, k_t), dk_c, dv_c

            branches = (lambda a: a, lambda a: pair(a, False), lambda a: pair(a, True))
            dq_c, dk_c, dv_c = lax.switch(classify(s.mask, k_mask), branches, (dq_c, *carry))
            return (dk_c, dv_c), dq_c

        (dk_t, dv_t), dq_all = lax.scan(per_query, (dk_t, dv_t), (dq_all, saved))
        return dq_all, (dk_t, dv_t)

    dq, (dk, dv) = lax.scan(per_key, dq, (zeros, zeros, k_split, v_split, key_mask))
    return dq, dk, dv


@dataclass(frozen=True)
class XlaKernel:
    """See :class:`~lwm_jax_ring.attention.kernels.contract.Kernel`.

    Args:
        scale: softmax scale.
        query_chunk, key_chunk: tokens computed at a time; see :func:`chunk_length`.
        softcap: see :func:`~lwm_jax_ring.attention.kernels.contract.capped`; none: scores stay as they are.
    """

    scale: float
    query_chunk: int
    key_chunk: int
    softcap: float | None = None

    def queries(self, q: jax.Array, mask: Queries, kv_heads: int) -> Prepared:
        scaled = q * jnp.asarray(self.scale, q.dtype)
        return Prepared(split_queries(scaled, kv_heads, self.query_chunk), split_query_mask(mask, self.query_chunk))

    def start(self, queries: Prepared) -> State:
        return start(queries.q)

    def absorb(self, state: State, queries: Prepared, k: jax.Array, v: jax.Array, keys: Keys) -> State:
        return forward_block(state, queries, k, v, keys, self.key_chunk, self.softcap)

    def finish(self, state: State, length: int) -> tuple[jax.Array, jax.Array]:
        out, lse = finish(state)
        lse = join_queries(lse[..., None], length, self.query_chunk)[..., 0]
        return join_queries(out, length, self.query_chunk), lse

    def saved(
        self, q: jax.Array, out: jax.Array, dout: jax.Array, lse: jax.Array, mask: Queries, kv_heads: int
    ) -> Saved:
        def split(x: jax.Array) -> jax.Array:
            return split_queries(x, kv_heads, self.query_chunk)

        return Saved(
            q=split(q * jnp.asarray(self.scale, q.dtype)),
            dout=split(dout.astype(q.dtype)),
            lse=split(lse[..., None])[..., 0],
            delta=split(row_sums(out, dout)[..., None])[..., 0],
            mask=split_query_mask(mask, self.query_chunk),
        )

    def start_gradient(self, saved: Saved) -> jax.Array:
        return jnp.zeros(saved.q.shape, jnp.float32)

    def gradients(
        self, dq: jax.Array, saved: Saved, k: jax.Array, v: jax.Array, keys: Keys
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        dq, dk, dv = backward_block(dq, saved, k, v, keys, self.key_chunk, self.softcap)
        return dq, join_keys(dk, k.shape[1]), join_keys(dv, k.shape[1])

    def finish_gradient(self, dq: jax.Array, length: int) -> jax.Array:
        return join_queries(dq * self.scale, length, self.query_chunk)
