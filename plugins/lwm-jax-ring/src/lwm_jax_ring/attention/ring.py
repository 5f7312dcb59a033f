"""Strategy ``ring``: keys and values travel round the ``sp`` axis while every rank's queries stay.

Ring Attention with Blockwise Transformers (arXiv 2310.01889) as one ``custom_vjp`` around the whole ring. The forward
pass saves q, k, v, out and lse and nothing else. The backward pass recomputes the weights from lse, sends K and V
round again, and lets float32 dK and dV travel with them until they are home.

Transfers for n ranks: forward n−1 of K and V in their own dtype; backward n−1 of K and V and n of dK and dV; none at
n = 1. A transfer is issued before the compute that hides it.

Shapes, all of one rank: B batch, C tokens, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lwm_core.attention import AttentionMask
from lwm_core.layout import SequenceLayout
from lwm_jax_ring.attention.blocks import (
    Keys,
    Queries,
    document_bounds,
    natural_indices,
    query_bounds,
    to_natural,
)
from lwm_jax_ring.attention.kernels import xla

OUT_NAME, LSE_NAME = "attention_out", "attention_lse"
"""Names of the saved residuals, for remat policies that keep them so that the ring does not run twice."""


@dataclass(frozen=True)
class RingSpec:
    """All that is static about a ring: compared and hashed by value, so that a program is compiled once for each."""

    axis: str
    layout: SequenceLayout
    seq_len: int
    mask: AttentionMask
    scale: float
    query_chunk: int
    key_chunk: int

    @property
    def world(self) -> int:
        """Ranks of the ring."""
        return self.layout.world

    @property
    def run(self) -> int:
        """Consecutive tokens that a rank holds at least, where its layout has runs."""
        count = self.seq_len // self.world
        return count // 2 if self.layout.kind == "zigzag" and self.world > 1 else count


def _send(x: Any, spec: RingSpec) -> Any:
    """Every rank's ``x`` to the next rank."""
    pairs = [(rank, (rank + 1) % spec.world) for rank in range(spec.world)]
    return jax.tree.map(lambda leaf: lax.ppermute(leaf, spec.axis, pairs), x)


def _hops(step: Callable[[jax.Array, Any], Any], carry: Any, spec: RingSpec) -> Any:
    """``step`` for every hop but the last, which has nothing to wait for and so is the caller's."""
    return carry if spec.world == 1 else lax.fori_loop(0, spec.world - 1, step, carry)


def _tied(spec: RingSpec, *arrays: jax.Array | None) -> tuple[Any, ...]:
    """The arrays and this rank's number, as one thing that cannot be had in part.

    Masks depend on rank and segment ids alone and so are the same in every layer. A scan over layers moves what is the
    same out of itself: without this tie it would make the masks of all hops once and keep them, S×S in all.
    """
    rank = jnp.int32(0) if spec.world == 1 else lax.axis_index(spec.axis)
    tied: tuple[Any, ...] = lax.optimization_barrier((*arrays, rank))
    return tied


def _keys(rank: jax.Array, hop: jax.Array | int, segments: jax.Array | None, spec: RingSpec) -> Keys:
    """The mask side of the keys that are at ``rank`` at ``hop``."""
    return Keys(natural_indices(spec.layout, spec.seq_len, (rank - hop) % spec.world), segments)


def _queries(rank: jax.Array, segments: jax.Array | None, spec: RingSpec) -> Queries:
    """The mask side of the queries of ``rank``."""
    index = natural_indices(spec.layout, spec.seq_len, rank)
    first = last = None
    if spec.mask.block is not None and segments is not None:
        whole = segments if spec.world == 1 else lax.all_gather(segments, spec.axis, axis=1, tiled=True)
        first, last = (bound[:, index] for bound in document_bounds(to_natural(whole, spec.layout)))
    low, high = query_bounds(spec.mask, index, spec.seq_len, first, last)
    return Queries(low, high, segments)


def _chunks(spec: RingSpec) -> tuple[int, int]:
    return xla.chunk_length(spec.run, spec.query_chunk), xla.chunk_length(spec.run, spec.key_chunk)


def ring_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, spec: RingSpec
) -> tuple[jax.Array, jax.Array]:
    """Run the ring forward.

    Args:
        q: ``[B,C,H,D]``; k, v: ``[B,C,K,D]``; segments: ``[B,C]`` int32 or None, this rank's tokens.

    Returns:
        out ``[B,C,H,D]`` in q's dtype, and natural-log lse ``[B,C,H]`` float32.
    """
    q, k, v, segments, rank = _tied(spec, q, k, v, segments)
    query_chunk, key_chunk = _chunks(spec)
    queries = xla.split_query_mask(_queries(rank, segments, spec), query_chunk)
    split_q = xla.split_queries(q * jnp.asarray(spec.scale, q.dtype), k.shape[2], query_chunk)

    def compute(hop, state, travelling):  # type: ignore[no-untyped-def]
        k_here, v_here, seg_here = travelling
        return xla.forward_block(state, split_q, queries, k_here, v_here, _keys(rank, hop, seg_here, spec), key_chunk)

    def step(hop, carry):  # type: ignore[no-untyped-def]
        state, here = carry
        incoming = _send(here, spec)
        return compute(hop, state, here), incoming

    state, here = _hops(step, (xla.start(split_q), (k, v, segments)), spec)
    out, lse = xla.finish(compute(spec.world - 1, state, here))
    length = q.shape[1]
    return (
        xla.join_queries(out, length, query_chunk).astype(q.dtype),
        xla.join_queries(lse[..., None], length, query_chunk)[..., 0],
    )


def ring_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    spec: RingSpec,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk, dv in the dtypes of q, k, v; accumulated in float32 on the way."""
    q, k, v, segments, out, lse, dout, rank = _tied(spec, q, k, v, segments, out, lse, dout)
    query_chunk, key_chunk = _chunks(spec)
    kv_heads, length = k.shape[2], k.shape[1]
    queries = xla.split_query_mask(_queries(rank, segments, spec), query_chunk)
    delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)[..., None]
    saved = xla.Saved(
        q=xla.split_queries(q * jnp.asarray(spec.scale, q.dtype), kv_heads, query_chunk),
        dout=xla.split_queries(dout.astype(q.dtype), kv_heads, query_chunk),
        lse=xla.split_queries(lse, kv_heads, query_chunk)[..., 0],
        delta=xla.split_queries(delta, kv_heads, query_chunk)[..., 0],
    )

    def compute(hop, dq, travelling, gradients):  # type: ignore[no-untyped-def]
        k_here, v_here, seg_here = travelling
        keys = _keys(rank, hop, seg_here, spec)
        return xla.backward_block(dq, *gradients, saved, queries, k_here, v_here, keys, key_chunk)

    def step(hop, carry):  # type: ignore[no-untyped-def]
        dq, here, gradients = carry
        incoming = _send(here, spec)
        dq, *gradients = compute(hop, dq, here, gradients)
        return dq, incoming, _send(tuple(gradients), spec)

    zero_kv = jnp.zeros_like(xla.split_keys(k, key_chunk), dtype=jnp.float32)
    carry = (jnp.zeros(saved.q.shape, jnp.float32), (k, v, segments), (zero_kv, zero_kv))
    dq, here, gradients = _hops(step, carry, spec)
    dq, dk, dv = compute(spec.world - 1, dq, here, gradients)
    if spec.world > 1:
        dk, dv = _send((dk, dv), spec)
    dq = xla.join_queries(dq * spec.scale, length, query_chunk)
    return dq.astype(q.dtype), xla.join_keys(dk, length).astype(k.dtype), xla.join_keys(dv, length).astype(v.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def ring_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, spec: RingSpec
) -> jax.Array:
    """Differentiable ring attention of one rank, inside ``shard_map``; see :func:`ring_forward` for the shapes."""
    return ring_forward(q, k, v, segments, spec)[0]


def _forward_rule(q, k, v, segments, spec):  # type: ignore[no-untyped-def]
    out, lse = ring_forward(q, k, v, segments, spec)
    out, lse = checkpoint_name(out, OUT_NAME), checkpoint_name(lse, LSE_NAME)
    return out, (q, k, v, segments, out, lse)


def _backward_rule(spec, residuals, dout):  # type: ignore[no-untyped-def]
    q, k, v, segments, out, lse = residuals
    return (*ring_backward(q, k, v, segments, out, lse, dout, spec), None)


ring_attention.defvjp(_forward_rule, _backward_rule)
