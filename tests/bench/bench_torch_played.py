"""A ring's ranks played through one after the other on one device: all they compute, and nothing sent.

Blocks, merges and sums are those of ``lwm_torch_ring``'s ring: K and V stacked once a pass as they would be sent, a
float32 dK and dV for every hop, added to what the ranks before have found, and brought into the dtype of K at the end.

Shapes: n ranks of C tokens in the layout's order, S = n·C, H query heads, K key-value heads, D head dim; B is 1.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lwm_core.attention import AttentionMask, needed_hops
from lwm_core.layout import SequenceLayout
from lwm_torch_ring.attention.accumulate import Saved, absorb, add_gradients, start
from lwm_torch_ring.attention.blocks import Plan
from lwm_torch_ring.attention.kernels.contract import Kernel
from lwm_torch_ring.attention.tiles import Pack

Results = tuple[Tensor, ...]
"""out, or out, dq, dk and dv."""


class PlayedRing:
    """Attention over all ranks of a layout.

    Args:
        layout: how tokens are dealt.
        seq_len: S.
        mask: which keys a query may see.
        kernel: computes the tiles.
        segment_ids: ``[1,S]`` in natural order, or none.
    """

    def __init__(
        self,
        layout: SequenceLayout,
        seq_len: int,
        mask: AttentionMask,
        kernel: Kernel,
        segment_ids: NDArray[Any] | None = None,
    ) -> None:
        self._layout, self._seq_len, self._kernel = layout, seq_len, kernel
        self._hops = needed_hops(mask, layout, seq_len)
        self._plans = [
            Plan(mask, layout, seq_len, rank, kernel.chunk, kernel.limit, segment_ids, kernel.packed is not None)
            for rank in range(layout.world)
        ]

    def prepare(self) -> dict[str, int]:
        """Work out all tiles, as a batch does once for all layers; how many there are of each kind, a pack as one."""
        counts: dict[str, int] = {}
        for rank, plan in enumerate(self._plans):
            for hop in self._hops:
                for tile in plan.tiles((rank - hop) % self._layout.world):
                    kind = f"pack of {tile.kind}" if isinstance(tile, Pack) else tile.kind
                    counts[kind] = counts.get(kind, 0) + 1
        return counts

    @cached_property
    def _order(self) -> Tensor:
        return torch.from_numpy(self._layout.permutation(self._seq_len).astype(np.int64))

    def deal(self, x: Tensor) -> Tensor:
        """``[1,S,·,D]`` in natural order → ``[n,1,C,·,D]``."""
        return x[:, self._order.to(x.device)].unflatten(1, (self._layout.world, -1)).transpose(0, 1).contiguous()

    def natural(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`deal`."""
        back = torch.from_numpy(self._layout.inverse(self._seq_len).astype(np.int64))
        return x.transpose(0, 1).flatten(1, 2)[:, back.to(x.device)]

    def run(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None = None) -> Results:
        """Forward, and with ``dout`` backward; ``[n,1,C,·,D]`` in and out."""
        world = self._layout.world
        keys = torch.stack((k, v), 1)  # [n,2,1,C,K,D]
        found: list[Results] = []
        sums: list[Tensor | None] = [None] * world  # [2,1,C,K,D] float32, dK and dV of each rank's keys
        for rank, plan in enumerate(self._plans):
            places = [(rank - hop) % world for hop in self._hops]
            state = start(q[rank])
            for source in places:
                absorb(state, q[rank], *keys[source], plan.tiles(source), self._kernel)
            out = state.out.to(q.dtype)
            if dout is None:
                found.append((out,))
                continue
            lse = state.lse.masked_fill(state.lse.isneginf(), torch.inf)
            saved = Saved(q[rank], out, dout[rank], lse)
            dq = torch.zeros(q[rank].shape, dtype=torch.float32, device=q.device)
            for source in places:
                mine = torch.zeros(keys[source].shape, dtype=torch.float32, device=q.device)
                add_gradients(dq, *mine, saved, *keys[source], plan.tiles(source), self._kernel)
                before = sums[source]
                sums[source] = mine if before is None else before.add_(mine)
            found.append((out, dq.to(q.dtype)))
        results = [torch.stack(parts) for parts in zip(*found, strict=True)]
        if dout is None:
            return tuple(results)
        gradients = torch.stack([x.to(k.dtype) for x in sums if x is not None])  # [n,2,1,C,K,D]
        return (*results, gradients[:, 0], gradients[:, 1])
