"""The attention backend ``torch-ring``: binds a strategy to the trainer's mesh.

Shapes: B batch, C tokens of a process, H query heads, K key-value heads, D head dim; this rank's shards, tokens in the
layout's order.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lwm_core.attention import AttentionMask
from lwm_core.attention_cost import AttentionShape
from lwm_core.layout import SequenceLayout
from lwm_core.protocols import AttentionAxes, AttentionChoice
from lwm_torch_ring.attention.auto import resolve
from lwm_torch_ring.attention.options import AttentionOptions
from lwm_torch_ring.attention.peers import neighbourhood, peers_on
from lwm_torch_ring.attention.spec import AttentionSpec
from lwm_torch_ring.attention.strategies import (
    attention_spec,
    check_arrays,
    inner_ranks,
    make_kernel,
    sequence_layout,
    strategy_of,
)

if TYPE_CHECKING:
    from lwm_torch_ring.attention.harness import TorchRingHarness


_numbers = count()


class TorchRing:
    """Attention over the ``sp`` axis of a ``DeviceMesh`` for sequences of ``seq_len`` tokens; no mesh: one process."""

    def __init__(self, options: AttentionOptions, mesh: Any | None, axes: AttentionAxes, seq_len: int) -> None:
        everyone = peers_on(mesh, axes.seq)
        self.options, self.seq_len = options, seq_len
        self._name = f"torch-ring-{next(_numbers)}"
        self.layout = sequence_layout(options, seq_len, everyone.size)
        self._attention = strategy_of(options).attention
        self._peers = neighbourhood(everyone, inner_ranks(options, everyone.size))
        self._specs: dict[Any, AttentionSpec] = {}

    @torch.compiler.assume_constant_result
    def _spec(
        self, _: str, mask: AttentionMask, device: torch.device, dtype: torch.dtype, head_dim: int
    ) -> AttentionSpec:
        """What a compiled program asks for once, while it is traced; given the backend's name, it is bound to it."""
        key = mask, device, dtype, head_dim
        if key not in self._specs:
            kernel = make_kernel(self.options, device, dtype, head_dim)
            self._specs[key] = attention_spec(self.options, self._peers, self.seq_len, mask, kernel)
        return self._specs[key]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`attend`, and natural-log lse ``[B,C,H]`` float32, −inf where a query sees nothing.

        The gradient of lse is refused.
        """
        out, lse = self._run(q, k, v, mask, segment_ids, lse=True)
        assert lse is not None
        return out, lse

    def _run(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, segment_ids: Tensor | None, lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        check_arrays(q, k, v, segment_ids, self.seq_len // self._peers.everyone.size)
        spec = self._spec(self._name, mask, q.device, q.dtype, q.shape[-1])
        return self._attention(q, k, v, segment_ids, spec, lse)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, segment_ids: Tensor | None = None) -> Tensor:
        """Differentiable attention of this rank's shards; every rank of the ``sp`` axis calls it at the same time.

        Args:
            q: ``[B,C,H,D]``; k, v: ``[B,C,K,D]``, float32 or bfloat16, tokens in the layout's order.
            mask: which keys a query may see.
            segment_ids: ``[B,C]`` int32, documents from 1; 0 sees nothing. None: one document a row. Pass the same
                tensor to all layers: what it means for the blocks is then worked out once.

        Returns:
            ``[B,C,H,D]`` in q's dtype; 0 where a query sees nothing.

        Raises:
            ShapeError: shapes do not fit.
            UnsupportedError: heads do not divide over the ranks they are dealt to, a dtype other than float32 and
                bfloat16, a kernel that cannot run here, or a document whose tokens do not stand together.
            PeerLost: a transfer did not come about, most often since another rank has died.
        """
        return self._run(q, k, v, mask, segment_ids, lse=False)[0]


class TorchRingFactory:
    """The factory object of the plugin."""

    def resolve(
        self, options: AttentionOptions, shape: AttentionShape, mesh: Any | None, axes: AttentionAxes
    ) -> AttentionChoice:
        """See :func:`lwm_torch_ring.attention.auto.resolve`."""
        return resolve(options, shape, mesh, axes, sequence_layout)

    def layout(self, options: AttentionOptions, seq_len: int, world: int) -> SequenceLayout:
        """The layout over ``world`` processes, of a ring while ``auto`` is not resolved; raises ShapeError for a
        length that does not divide."""
        return sequence_layout(options, seq_len, world)

    def build(self, options: AttentionOptions, mesh: Any | None, axes: AttentionAxes, seq_len: int) -> TorchRing:
        """The backend on the trainer's mesh; every rank calls it at the same time."""
        return TorchRing(options, mesh, axes, seq_len)

    def harness(self, options: AttentionOptions, world: int) -> TorchRingHarness:
        """``world`` gloo processes on this machine's CPU."""
        from lwm_torch_ring.attention.harness import TorchRingHarness

        return TorchRingHarness(options, world)


factory = TorchRingFactory()
