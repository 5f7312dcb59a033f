"""Strategy ``allgather``: every rank fetches all keys and values at once, and keeps its queries.

Llama 3's context parallelism (arXiv 2407.21783, section 3.3.2). One gather instead of n−1 hops, which wins where hops
are too short to be hidden or documents leave most of them nothing to do; each rank then holds the keys of the whole
sequence, so that memory grows with it. The backward pass gathers again, and scatters float32 dK and dV as it sums them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lwm_jax_ring.attention.blocks import Keys
from lwm_jax_ring.attention.differentiable import Here, differentiable
from lwm_jax_ring.attention.spec import AttentionSpec


def _everything(here: Here, spec: AttentionSpec) -> tuple[jax.Array, jax.Array, Keys]:
    """k and v ``[B,S,K,D]`` of all ranks in the layout's order, and their mask side."""
    ranks = jnp.arange(spec.world, dtype=jnp.int32)
    index = jax.vmap(lambda rank: spec.keys(rank, None).index)(ranks).reshape(-1)
    segments = None if here.segments is None else spec.gather(here.segments)
    return spec.gather(here.k), spec.gather(here.v), Keys(index, segments)


def _absorb(queries: Any, here: Here, _: jax.Array, spec: AttentionSpec) -> Any:
    return spec.kernel.absorb(spec.kernel.start(queries), queries, *_everything(here, spec))


def _gradients(saved: Any, here: Here, _: jax.Array, spec: AttentionSpec) -> tuple[Any, jax.Array, jax.Array]:
    dq, dk, dv = spec.kernel.gradients(spec.kernel.start_gradient(saved), saved, *_everything(here, spec))
    if spec.world > 1:
        dk, dv = (lax.psum_scatter(x, spec.axis, scatter_dimension=1, tiled=True) for x in (dk, dv))
    return dq, dk, dv


ALLGATHER = differentiable(_absorb, _gradients)
