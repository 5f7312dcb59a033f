"""Strategy ``allgather``: every rank fetches all keys and values at once, and keeps its queries.

Llama 3's context parallelism (arXiv 2407.21783, section 3.3.2). One gather instead of n−1 hops, which wins where hops
are too short to be hidden or documents leave most of them nothing to do; each rank then holds the keys of the whole
sequence, so that memory grows with it. The backward pass gathers again, and scatters float32 dK and dV as it sums them.

Shapes, all of one rank: B batch, C tokens, S all tokens, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lwm_jax_ring.attention.blocks import Keys
from lwm_jax_ring.attention.ring import LSE_NAME, OUT_NAME, tied
from lwm_jax_ring.attention.spec import AttentionSpec, residual_lse


def _all_keys(segments: jax.Array | None, spec: AttentionSpec) -> Keys:
    """The mask side of all keys, in the layout's order."""
    ranks = jnp.arange(spec.world, dtype=jnp.int32)
    index = jax.vmap(lambda rank: spec.keys(rank, None).index)(ranks).reshape(-1)
    return Keys(index, None if segments is None else spec.gather(segments))


def allgather_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, spec: AttentionSpec
) -> tuple[jax.Array, jax.Array]:
    """out ``[B,C,H,D]`` in q's dtype and lse ``[B,C,H]``; arguments as in ``ring_forward``."""
    q, k, v, segments, rank = tied(spec, q, k, v, segments)
    kernel = spec.kernel
    queries = kernel.queries(q, spec.queries(rank, segments), k.shape[2])
    state = kernel.absorb(kernel.start(queries), queries, spec.gather(k), spec.gather(v), _all_keys(segments, spec))
    out, lse = kernel.finish(state, q.shape[1])
    return out.astype(q.dtype), lse


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def allgather_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, spec: AttentionSpec
) -> jax.Array:
    """Differentiable attention of one rank over gathered keys, inside ``shard_map``."""
    return allgather_forward(q, k, v, segments, spec)[0]


def _forward_rule(q, k, v, segments, spec):  # type: ignore[no-untyped-def]
    out, lse = allgather_forward(q, k, v, segments, spec)
    out, lse = checkpoint_name(out, OUT_NAME), checkpoint_name(lse, LSE_NAME)
    return out, (q, k, v, segments, out, lse)


def _backward_rule(spec, residuals, dout):  # type: ignore[no-untyped-def]
    q, k, v, segments, out, lse, dout, rank = tied(spec, *residuals, dout)
    kernel = spec.kernel
    delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(axis=-1)
    saved = kernel.saved(q, dout, residual_lse(lse), delta, spec.queries(rank, segments), k.shape[2])
    dq, dk, dv = kernel.gradients(
        kernel.start_gradient(saved), saved, spec.gather(k), spec.gather(v), _all_keys(segments, spec)
    )
    if spec.world > 1:
        dk, dv = (lax.psum_scatter(x, spec.axis, scatter_dimension=1, tiled=True) for x in (dk, dv))
    dq = kernel.finish_gradient(dq, q.shape[1])
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


allgather_attention.defvjp(_forward_rule, _backward_rule)
