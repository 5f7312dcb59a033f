"""What every strategy does alike: the kernel's beginning and end, and the gradient rule around both.

A strategy itself is two functions: how keys come to the queries, and how their gradients go home. The forward pass
saves q, k, v, out and lse and nothing else; the backward pass makes the weights again from lse.

Shapes, all of one rank: B batch, C tokens, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lwm_jax_ring.attention.spec import AttentionSpec

OUT_NAME, LSE_NAME = "attention_out", "attention_lse"
"""Names of the saved residuals, for remat policies that keep them so that attention does not run twice."""


class Here(NamedTuple):
    """The keys that a device holds."""

    k: jax.Array  # [B,C,K,D]
    v: jax.Array  # [B,C,K,D]
    segments: jax.Array | None  # [B,C]


Absorb = Callable[[Any, Here, jax.Array, AttentionSpec], Any]
"""(the kernel's queries, here, rank, spec) → the kernel's state after the queries have seen all keys."""

Gradients = Callable[[Any, Here, jax.Array, AttentionSpec], tuple[Any, jax.Array, jax.Array]]
"""(what the kernel saved, here, rank, spec) → the kernel's dq, and dk and dv of the keys here, float32."""


class Attention(NamedTuple):
    """Attention of one device, inside ``shard_map``: functions of (q ``[B,C,H,D]``, k, v, segments, spec)."""

    attention: Callable[..., jax.Array]  # out [B,C,H,D] in q's dtype, differentiable
    forward: Callable[..., tuple[jax.Array, jax.Array]]  # the same, and natural-log lse [B,C,H] float32


def _tied(spec: AttentionSpec, *arrays: jax.Array | None) -> tuple[Any, ...]:
    """The arrays and this rank's number, as one thing that cannot be had in part.

    Masks depend on rank and segment ids alone and so are the same in every layer. A scan over layers moves what is the
    same out of itself: without this tie it would make the masks of all hops once and keep them, S×S in all.
    """
    together: tuple[Any, ...] = lax.optimization_barrier((*arrays, spec.rank()))
    return together


def differentiable(absorb: Absorb, gradients: Gradients) -> Attention:
    """The attention of a strategy, as one ``custom_vjp`` around all that it sends."""

    def forward(q, k, v, segments, spec):  # type: ignore[no-untyped-def]
        q, k, v, segments, rank = _tied(spec, q, k, v, segments)
        queries = spec.kernel.queries(q, spec.queries(rank, segments), k.shape[2])
        out, lse = spec.kernel.finish(absorb(queries, Here(k, v, segments), rank, spec), q.shape[1])
        return out.astype(q.dtype), lse

    @partial(jax.custom_vjp, nondiff_argnums=(4,))
    def attention(q, k, v, segments, spec):  # type: ignore[no-untyped-def]
        return forward(q, k, v, segments, spec)[0]

    def forward_rule(q, k, v, segments, spec):  # type: ignore[no-untyped-def]
        out, lse = forward(q, k, v, segments, spec)
        out, lse = checkpoint_name(out, OUT_NAME), checkpoint_name(lse, LSE_NAME)
        return out, (q, k, v, segments, out, lse)

    def backward_rule(spec, residuals, dout):  # type: ignore[no-untyped-def]
        q, k, v, segments, out, lse, dout, rank = _tied(spec, *residuals, dout)
        lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)  # a query that saw nothing has weights 0
        saved = spec.kernel.saved(q, out, dout, lse, spec.queries(rank, segments), k.shape[2])
        dq, dk, dv = gradients(saved, Here(k, v, segments), rank, spec)
        dq = spec.kernel.finish_gradient(dq, q.shape[1])
        return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None

    attention.defvjp(forward_rule, backward_rule)
    return Attention(attention, forward)
