"""What is static about one attention: where the tokens lie, who may see whom, and which kernel computes it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
from jax import lax

from lwm_core.attention import AttentionMask, needed_hops
from lwm_core.layout import SequenceLayout
from lwm_jax_ring.attention.blocks import (
    Keys,
    Queries,
    document_bounds,
    natural_indices,
    query_bounds,
    to_natural,
)
from lwm_jax_ring.attention.kernels.contract import Kernel


@dataclass(frozen=True)
class AttentionSpec:
    """Compared and hashed by value, so that a program is compiled once for each.

    A mesh axis of ``layout.world × inner`` devices holds the sequence: ``inner`` neighbours, which have exchanged their
    heads for tokens (see ``ulysses.py``), are one rank of the layout.

    Args:
        axis: mesh axis.
        layout: how tokens are dealt to ranks.
        seq_len: tokens of the whole sequence.
        mask: which keys a query may see.
        kernel: computes the blocks.
        inner: devices a rank.
    """

    axis: str
    layout: SequenceLayout
    seq_len: int
    mask: AttentionMask
    kernel: Kernel
    inner: int = 1

    @property
    def world(self) -> int:
        """Ranks."""
        return self.layout.world

    @cached_property
    def hops(self) -> tuple[int, ...]:
        """The hops of a ring that bring something."""
        return needed_hops(self.mask, self.layout, self.seq_len)

    def rank(self) -> jax.Array:
        """This device's rank; int32 scalar."""
        return jnp.int32(0) if self.world == 1 else lax.axis_index(self.axis) // self.inner

    def groups(self) -> list[list[int]] | None:
        """For a collective among ranks: the devices that hold the same heads; none where that is all of them."""
        if self.inner == 1:
            return None
        return [[rank * self.inner + i for rank in range(self.world)] for i in range(self.inner)]

    def gather(self, x: jax.Array) -> jax.Array:
        """``[B, S/world, ...]`` of all ranks, one after the other: ``[B, S, ...]`` in the layout's order."""
        if self.world == 1:
            return x
        return lax.all_gather(x, self.axis, axis=1, tiled=True, axis_index_groups=self.groups())

    def queries(self, rank: jax.Array, segments: jax.Array | None) -> Queries:
        """The mask side of the queries of ``rank``."""
        index = natural_indices(self.layout, self.seq_len, rank)
        first = last = None
        if self.mask.block is not None and segments is not None:
            whole = to_natural(self.gather(segments), self.layout)
            first, last = (bound[:, index] for bound in document_bounds(whole))
        low, high = query_bounds(self.mask, index, self.seq_len, first, last)
        return Queries(low, high, segments)

    def keys(self, rank: jax.Array, segments: jax.Array | None) -> Keys:
        """The mask side of the keys of ``rank``."""
        return Keys(natural_indices(self.layout, self.seq_len, rank % self.world), segments)
