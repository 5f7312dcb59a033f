"""What computes one tile of attention: the seam behind which kernels are exchanged.

``fwd(q, k, v, mask) -> (out, lse)`` and ``bwd(do, q, k, v, out, lse) -> (dq, dk, dv)``, where the mask is a
:class:`~lwm_torch_ring.attention.tiles.Tile` and the backward pass takes ``out`` and ``lse`` over all keys of all
ranks. lse is natural-log float32; −inf where a query sees nothing of the tile, whose out is 0. The backward pass is
given +inf, not −inf, where a query sees nothing at all, so that its weights are 0.

Shapes: B rows, c queries and t keys of a tile, Q queries and T keys of a pack, H query heads, K key-value heads, D head
dim.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lwm_torch_ring.attention.tiles import Spans, Tile


class PackKernel(Protocol):
    """Attention over many tiles at once, all whole or all on the diagonal, one after the other in the tensors."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, diagonal: bool) -> tuple[Tensor, Tensor]:
        """out ``[Q,H,D]`` and lse ``[Q,H]`` of ``q [Q,H,D]`` over ``k, v [T,K,D]``."""
        ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans, diagonal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """These tiles' share of dq ``[Q,H,D]``, dk and dv ``[T,K,D]``."""
        ...


class Kernel(Protocol):
    """Attention over one tile.

    Attributes:
        name: as the option ``kernel`` has it.
        chunk: longest side of a ragged tile.
        limit: longest side of any tile; none: as long as they come.
        packed: computes many tiles at once, where it does.
    """

    name: str
    chunk: int
    limit: int | None
    packed: PackKernel | None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        """out ``[B,c,H,D]`` and lse ``[B,c,H]`` of ``q [B,c,H,D]`` over ``k, v [B,t,K,D]``."""
        ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: Tile
    ) -> tuple[Tensor, Tensor, Tensor]:
        """This tile's share of dq ``[B,c,H,D]``, dk and dv ``[B,t,K,D]``."""
        ...


def visible(tile: Tile, device: torch.device) -> Tensor | None:
    """``[c, t]`` bool: whether a query sees a key; none where all see all."""
    queries, keys = tile.q.stop - tile.q.start, tile.k.stop - tile.k.start
    if tile.kind == "whole":
        return None
    if tile.kind == "diagonal":
        return torch.ones(queries, keys, dtype=torch.bool, device=device).tril_()
    low, high = (torch.from_numpy(bound).to(device)[:, None] for bound in (tile.low, tile.high))
    key = torch.arange(keys, device=device)
    return (low <= key) & (key < high)


def unseeing(tile: Tile, device: torch.device) -> Tensor | None:
    """``[c]`` bool: which queries see nothing of the tile; none where all see something."""
    nothing = tile.unseeing
    return None if nothing is None else torch.from_numpy(nothing).to(device)
