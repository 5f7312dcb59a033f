"""Strategy ``ring``: keys and values travel round the ``sp`` axis while every rank's queries stay.

Ring Attention with Blockwise Transformers (arXiv 2310.01889) as one ``custom_vjp`` around the whole ring. The forward
pass saves q, k, v, out and lse and nothing else. The backward pass recomputes the weights from lse and sends K and V
round again; float32 dK and dV follow one hop behind, so that they too travel while something is computed.

Transfers for n ranks: forward n−1 of K and V in their own dtype; backward n−1 of K and V and n of dK and dV; none at
n = 1. Each is issued before the compute that hides it. Hops that a window leaves nothing to do for are jumped over.

Shapes, all of one rank: B batch, C tokens, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lwm_jax_ring.attention.spec import AttentionSpec, residual_lse

OUT_NAME, LSE_NAME = "attention_out", "attention_lse"
"""Names of the saved residuals, for remat policies that keep them so that the ring does not run twice."""

Travelling = tuple[jax.Array, jax.Array, jax.Array | None]
"""k and v ``[B,C,K,D]`` and segment ids ``[B,C]``."""


def _send(x: Any, ranks: int, spec: AttentionSpec) -> Any:
    """Every rank's ``x`` to the one that is ``ranks`` further on."""
    if ranks % spec.world == 0:
        return x
    devices = spec.world * spec.inner
    pairs = [(device, (device + ranks * spec.inner) % devices) for device in range(devices)]
    return jax.tree.map(lambda leaf: lax.ppermute(leaf, spec.axis, pairs), x)


def _over_hops(step: Callable[[Any, Any, int, int], Any], carry: Any, spec: AttentionSpec, start: int) -> Any:
    """``step(hop, carry, ahead, behind)`` for the needed hops from number ``start`` but the last.

    ``ahead`` is how far keys go to the next needed hop, ``behind`` how far they have come from the one before. A ring
    without gaps is a loop, so that its program does not grow with it.
    """
    hops = spec.hops
    if hops == tuple(range(len(hops))):
        return lax.fori_loop(start, max(start, len(hops) - 1), lambda hop, carry: step(hop, carry, 1, 1), carry)
    for number in range(start, len(hops) - 1):
        hop = hops[number]
        carry = step(hop, carry, hops[number + 1] - hop, hop - hops[max(0, number - 1)])
    return carry


def tied(spec: AttentionSpec, *arrays: jax.Array | None) -> tuple[Any, ...]:
    """The arrays and this rank's number, as one thing that cannot be had in part.

    Masks depend on rank and segment ids alone and so are the same in every layer. A scan over layers moves what is the
    same out of itself: without this tie it would make the masks of all hops once and keep them, S×S in all.
    """
    together: tuple[Any, ...] = lax.optimization_barrier((*arrays, spec.rank()))
    return together


def ring_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, spec: AttentionSpec
) -> tuple[jax.Array, jax.Array]:
    """Run the ring forward.

    Args:
        q: ``[B,C,H,D]``; k, v: ``[B,C,K,D]``; segments: ``[B,C]`` int32 or None, this rank's tokens.

    Returns:
        out ``[B,C,H,D]`` in q's dtype, and natural-log lse ``[B,C,H]`` float32.
    """
    q, k, v, segments, rank = tied(spec, q, k, v, segments)
    kernel = spec.kernel
    queries = kernel.queries(q, spec.queries(rank, segments), k.shape[2])

    def compute(hop: Any, state: Any, here: Travelling) -> Any:
        return kernel.absorb(state, queries, here[0], here[1], spec.keys(rank - hop, here[2]))

    def step(hop: Any, carry: Any, ahead: int, _: int) -> Any:
        state, here = carry
        incoming = _send(here, ahead, spec)
        return compute(hop, state, here), incoming

    state, here = _over_hops(step, (kernel.start(queries), (k, v, segments)), spec, 0)
    out, lse = kernel.finish(compute(spec.hops[-1], state, here), q.shape[1])
    return out.astype(q.dtype), lse


def ring_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    spec: AttentionSpec,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk, dv in the dtypes of q, k, v; accumulated in float32 on the way."""
    q, k, v, segments, out, lse, dout, rank = tied(spec, q, k, v, segments, out, lse, dout)
    kernel, hops = spec.kernel, spec.hops
    delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(axis=-1)
    saved = kernel.saved(q, dout, residual_lse(lse), delta, spec.queries(rank, segments), k.shape[2])

    def compute(hop: Any, dq: Any, here: Travelling) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        dq, *gradients = kernel.gradients(dq, saved, here[0], here[1], spec.keys(rank - hop, here[2]))
        return dq, tuple(gradients)

    def step(hop: Any, carry: Any, ahead: int, behind: int) -> Any:
        dq, here, gradients = carry
        incoming, gradients = _send(here, ahead, spec), _send(gradients, behind, spec)
        dq, more = compute(hop, dq, here)
        return dq, incoming, jax.tree.map(jnp.add, gradients, more)

    # The first hop has no gradients to wait for, and the last no keys to send on.
    here = (k, v, segments)
    incoming = _send(here, hops[1], spec) if len(hops) > 1 else None
    dq, gradients = compute(0, kernel.start_gradient(saved), here)
    if len(hops) > 1:
        dq, here, gradients = _over_hops(step, (dq, incoming, gradients), spec, 1)
        gradients = _send(gradients, hops[-1] - hops[-2], spec)
        dq, more = compute(hops[-1], dq, here)
        gradients = _send(jax.tree.map(jnp.add, gradients, more), -hops[-1], spec)
    dk, dv = gradients
    return kernel.finish_gradient(dq, q.shape[1]).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def ring_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, spec: AttentionSpec
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
