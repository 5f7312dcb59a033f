"""Strategy ``ring``: keys and values travel round the ``sp`` axis while every rank's queries stay.

Ring Attention with Blockwise Transformers (arXiv 2310.01889). The backward pass sends K and V round again; float32 dK
and dV follow one hop behind, so that they too travel while something is computed.

Transfers for n ranks: forward n−1 of K and V in their own dtype; backward n−1 of K and V, n−1 of float32 dK and dV and
one of the finished dK and dV in the dtype of K; none at n = 1. All but the last are issued before the compute that
hides them. Hops that a window leaves nothing to do for are jumped over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lwm_jax_ring.attention.differentiable import Here, differentiable
from lwm_jax_ring.attention.spec import AttentionSpec


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


def _absorb(queries: Any, here: Here, rank: jax.Array, spec: AttentionSpec) -> Any:
    """The kernel's state after one round."""
    kernel = spec.kernel

    def compute(hop: Any, state: Any, here: Here) -> Any:
        return kernel.absorb(state, queries, here.k, here.v, spec.keys(rank - hop, here.segments))

    def step(hop: Any, carry: Any, ahead: int, _: int) -> Any:
        state, here = carry
        incoming = _send(here, ahead, spec)
        return compute(hop, state, here), incoming

    state, here = _over_hops(step, (kernel.start(queries), here), spec, 0)
    return compute(spec.hops[-1], state, here)


def _gradients(saved: Any, here: Here, rank: jax.Array, spec: AttentionSpec) -> tuple[Any, jax.Array, jax.Array]:
    """dq, and dk and dv brought home, after one more round."""
    kernel, hops = spec.kernel, spec.hops

    def compute(hop: Any, dq: Any, here: Here) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        dq, dk, dv = kernel.gradients(dq, saved, here.k, here.v, spec.keys(rank - hop, here.segments))
        return dq, (dk, dv)

    def step(hop: Any, carry: Any, ahead: int, behind: int) -> Any:
        dq, here, gradients = carry
        incoming, gradients = _send(here, ahead, spec), _send(gradients, behind, spec)
        dq, more = compute(hop, dq, here)
        return dq, incoming, jax.tree.map(jnp.add, gradients, more)

    # The first hop has no gradients to wait for, and the last no keys to send on.
    incoming = _send(here, hops[1], spec) if len(hops) > 1 else None
    dq, gradients = compute(0, kernel.start_gradient(saved), here)
    if len(hops) > 1:
        dq, here, gradients = _over_hops(step, (dq, incoming, gradients), spec, 1)
        gradients = _send(gradients, hops[-1] - hops[-2], spec)
        dq, more = compute(hops[-1], dq, here)
        whole = jax.tree.map(lambda x, y: (x + y).astype(here.k.dtype), gradients, more)
        gradients = _send(whole, -hops[-1], spec)  # nothing is added any more, so that it goes home as it is given back
    return dq, *gradients


RING = differentiable(_absorb, _gradients)
