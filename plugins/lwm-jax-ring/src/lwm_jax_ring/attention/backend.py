"""The attention backend ``jax-ring``: binds a strategy to the trainer's mesh.

Shapes: B batch, S sequence, H query heads, K key-value heads, D head dim; global arrays, tokens in the layout's order.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lwm_core.attention import AttentionMask
from lwm_core.attention_cost import AttentionShape
from lwm_core.layout import SequenceLayout
from lwm_core.protocols import AttentionAxes, AttentionChoice
from lwm_jax_ring.attention.auto import resolve_strategy
from lwm_jax_ring.attention.harness import JaxRingHarness
from lwm_jax_ring.attention.options import AttentionOptions
from lwm_jax_ring.attention.strategies import STRATEGIES, attention_spec, check_arrays, sequence_layout
from lwm_jax_ring.attention.ulysses import repeat_kv_heads


class JaxRing:
    """Attention over the ``sp`` axis of ``mesh`` for sequences of ``seq_len`` tokens."""

    def __init__(self, options: AttentionOptions, mesh: Mesh, axes: AttentionAxes, seq_len: int) -> None:
        self.options, self.mesh, self.axes, self.seq_len = options, mesh, axes, seq_len
        self.layout = sequence_layout(options, seq_len, mesh.shape[axes.seq])

    def _specs(self) -> tuple[P, P]:
        batch, heads, seq = self.axes.batch, self.axes.heads, self.axes.seq
        return P(batch, seq, heads, None), P(batch, seq)

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """Differentiable attention; global arrays inside jit, tokens in the layout's order.

        Args:
            q: ``[B,S,H,D]``; k, v: ``[B,S,K,D]``, float32 or bfloat16.
            mask: which keys a query may see.
            segment_ids: ``[B,S]`` int32, documents from 1; 0 sees nothing. None: one document a row.

        Returns:
            ``[B,S,H,D]`` in q's dtype; 0 where a query sees nothing.

        Raises:
            ShapeError: shapes do not fit.
            UnsupportedError: heads do not divide over the ranks they are dealt to, or a dtype other than float32 and
                bfloat16.
        """
        heads, _ = self._specs()
        return self._run(STRATEGIES[self.options.strategy].attention, heads, q, k, v, mask, segment_ids)

    def forward(
        self, q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask, segment_ids: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """What :meth:`attend` gives, without a gradient, and natural-log lse ``[B,S,H]`` float32, −inf where a query
        sees nothing: by it the attention to these keys is merged with that to others."""
        heads, _ = self._specs()
        out = (heads, P(*heads[:3]))
        return self._run(STRATEGIES[self.options.strategy].forward, out, q, k, v, mask, segment_ids)

    def _run(
        self, function: Any, out: Any, q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask,
        segment_ids: jax.Array | None,
    ) -> Any:  # fmt: skip
        check_arrays(q, k, v, segment_ids, self.seq_len)
        k, v = repeat_kv_heads(q, k, v, self.mesh.shape[self.axes.heads])  # each tensor-parallel rank needs its own
        spec = attention_spec(self.options, self.mesh, self.axes.seq, self.seq_len, mask, q.shape[-1])
        heads, tokens = self._specs()
        given = (q, k, v) if segment_ids is None else (q, k, v, segment_ids)
        run = jax.shard_map(
            lambda a, b, c, s=None: function(a, b, c, s, spec),
            mesh=self.mesh,
            in_specs=(heads, heads, heads, tokens)[: len(given)],
            out_specs=out,
            check_vma=False,
        )
        return run(*given)


class JaxRingFactory:
    """The factory object of the plugin."""

    def resolve(
        self, options: AttentionOptions, shape: AttentionShape, mesh: Mesh, axes: AttentionAxes
    ) -> AttentionChoice:
        """See :func:`lwm_jax_ring.attention.auto.resolve_strategy`."""
        return resolve_strategy(options, shape, mesh, axes, sequence_layout)

    def layout(self, options: AttentionOptions, seq_len: int, world: int) -> SequenceLayout:
        """The layout over ``world`` devices, of a ring while ``auto`` is not resolved; raises ShapeError for a length
        that does not divide."""
        return sequence_layout(options, seq_len, world)

    def build(self, options: AttentionOptions, mesh: Mesh, axes: AttentionAxes, seq_len: int) -> JaxRing:
        """The backend on the trainer's mesh."""
        return JaxRing(options, mesh, axes, seq_len)

    def harness(self, options: AttentionOptions, world: int) -> JaxRingHarness:
        """``world`` host devices where the machine has no accelerators enough; call it before JAX has started."""
        from lwm_jax_ring.devices import ensure_devices

        ensure_devices(world)
        return JaxRingHarness(options, world)


factory = JaxRingFactory()
