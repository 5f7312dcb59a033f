"""Log-likelihoods of a long text in one context, without a cache: memory is that of one layer.

Shapes: B rows, all the same: one for each data rank; S slots, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import lcm
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray

from lwm_core.attention import AttentionMask
from lwm_core.errors import ShapeError
from lwm_core.mesh import data_ranks
from lwm_core.protocols import AttentionAxes
from lwm_jax_ring.generate.reading import few_sizes
from lwm_jax_ring.model.llama import Chunks
from lwm_jax_ring.model.rope import RopeTables, rope_tables
from lwm_jax_ring.model.sharding import ROWS, place
from lwm_jax_ring.train.heartbeat import naming_the_lost

if TYPE_CHECKING:
    from lwm_jax_ring.train.trainer import JaxTrainer

STEP = 64
"""Lengths are rounded up to multiples of this."""

TOKEN_CHUNK = 4096
"""Tokens of projections and feed-forward at a time, where the trainer's option says nothing."""


class Scorer:
    """Of a trainer's parameters and RoPE, as they are when it is called."""

    def __init__(self, trainer: JaxTrainer) -> None:
        self._trainer = trainer
        self._programs: dict[int, tuple[Any, Any]] = {}

    def log_likelihood(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """``[N-1]``: natural-log probability of each token after the first, in the slice of its own modality."""
        ids = np.asarray(tokens, np.int32)
        t, size = self._trainer, self._trainer.context.model.vocabulary.size
        if len(ids) < 2:
            raise ShapeError(f"score: {len(ids)} tokens; expected at least 2, for the first is not predicted")
        if ids.min() < 0 or ids.max() >= size:
            raise ShapeError(f"score: the tokens hold ids outside [0, {size})")
        slots = self.slots(len(ids))
        backend, program = self.program(slots)
        positions = np.arange(slots, dtype=np.int32)
        padded = np.zeros(slots, np.int32)
        padded[: len(ids)] = ids
        order, sharding = backend.layout.permutation(slots), NamedSharding(t.mesh, P(ROWS, "sp"))
        arrays = (padded, np.roll(padded, -1), (positions < len(ids)).astype(np.int32), positions)
        count = data_ranks(dict(t.mesh.shape))
        placed = [place(np.broadcast_to(x[order], (count, slots)), sharding) for x in arrays]
        with naming_the_lost(t.heart):
            scores = np.asarray(program(t.parameters, self.rope(slots), *placed))
        natural: NDArray[np.float32] = scores[0, backend.layout.inverse(slots)]
        return natural[: len(ids) - 1]

    def slots(self, tokens: int) -> int:
        """The length that so many tokens are padded to."""
        return few_sizes(tokens, lcm(STEP, 2 * self._trainer.mesh.shape["sp"]))

    def rope(self, slots: int) -> RopeTables:
        """Tables for so many positions."""
        return rope_tables(self._trainer.stage.rope, self._trainer.context.model.head_dim, slots)

    def program(self, slots: int) -> tuple[Any, Any]:
        """The attention for ``slots`` tokens, and the jitted (parameters, rope, tokens, targets, segments, positions
        ``[B,S]``) → ``[B,S]`` float32, permuted."""
        t = self._trainer
        if slots not in self._programs:
            backend = t.context.attention.build(t.current.attention.options, t.mesh, AttentionAxes(), slots)
            everywhere = None if t.processes.world == 1 else NamedSharding(t.mesh, P())
            self._programs[slots] = backend, jax.jit(partial(self._score, backend), out_shardings=everywhere)
        return self._programs[slots]

    def _score(
        self, backend: Any, parameters: Any, rope: RopeTables, tokens: jax.Array, targets: jax.Array,
        segments: jax.Array, positions: jax.Array,
    ) -> jax.Array:  # fmt: skip
        t, program = self._trainer, self._trainer.current.program
        sizes = dict(t.mesh.shape)
        chunks = program.compute.chunks or Chunks(TOKEN_CHUNK, sizes["sp"], data_ranks(sizes))
        how = replace(program.compute, remat="none", chunks=chunks)
        model, slices = t.network.merge(parameters), t.context.model.vocabulary.slices

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, given: Any) -> tuple[jax.Array, None]:
            return backend.attend(q, k, v, AttentionMask("causal"), segments), None

        hidden, _ = model.hidden(tokens, positions, rope, attend, how=how)

        def of_slice(part: tuple[jax.Array, jax.Array]) -> jax.Array:
            stream, wanted = part
            found = jnp.zeros(wanted.shape, jnp.float32)
            for ids in slices.values():
                rows = model.head[ids].astype(stream.dtype)
                logits = jnp.einsum("...e,ve->...v", stream, rows, preferred_element_type=jnp.float32)
                local = jnp.clip(wanted - ids.start, 0, ids.stop - ids.start - 1)
                chosen = jnp.take_along_axis(logits, local[..., None], axis=-1)[..., 0]
                mine = (wanted >= ids.start) & (wanted < ids.stop)
                found = jnp.where(mine, chosen - jax.nn.logsumexp(logits, axis=-1), found)
            return found

        parts = lax.map(of_slice, (program.loss_chunks.split(hidden), program.loss_chunks.split(targets)))
        return jnp.moveaxis(parts, 0, 2).reshape(targets.shape)
