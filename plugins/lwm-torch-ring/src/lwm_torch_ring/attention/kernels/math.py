"""Kernel ``math``: a tile in plain torch operations, in float32, on every device; others are checked against it.

It makes all scores of a tile, so that its tiles are at most chunk × chunk.

Shapes: B rows, c queries and t keys of a tile, H query heads, K key-value heads, G = H / K, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lwm_torch_ring.attention.kernels.contract import visible
from lwm_torch_ring.attention.tiles import Tile


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """``[B,c,H,D]`` → ``[B,K,G,c,D]`` float32."""
    rows, count, heads, dim = x.shape
    return x.float().view(rows, count, kv_heads, heads // kv_heads, dim).permute(0, 2, 3, 1, 4)


def _flat(x: Tensor) -> Tensor:
    """``[B,K,G,c,D]`` → ``[B,c,H,D]``."""
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _heads_first(x: Tensor) -> Tensor:
    """``[B,t,K,D]`` → ``[B,K,1,t,D]`` float32."""
    return x.float().transpose(1, 2)[:, :, None]


@dataclass(frozen=True)
class MathKernel:
    """See :class:`~lwm_torch_ring.attention.kernels.contract.Kernel`.

    Args:
        scale: softmax scale.
        chunk: longest side of a tile.
    """

    scale: float
    chunk: int
    name: str = "math"
    packed: ClassVar[None] = None

    @property
    def limit(self) -> int:
        """Every tile is a chunk."""
        return self.chunk

    def _scores(self, q: Tensor, k: Tensor, tile: Tile) -> Tensor:
        """``[B,K,G,c,t]``, −inf where a query does not see a key."""
        scores = torch.matmul(q, k.transpose(-1, -2)) * self.scale
        seen = visible(tile, q.device)
        return scores if seen is None else scores.masked_fill_(~seen, -torch.inf)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        scores = self._scores(_grouped(q, k.shape[2]), _heads_first(k), tile)
        lse = scores.logsumexp(-1, keepdim=True)
        weights = scores.sub_(lse.masked_fill(lse.isneginf(), torch.inf)).exp_()
        return _flat(torch.matmul(weights, _heads_first(v))), _flat(lse)[..., 0]

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: Tile
    ) -> tuple[Tensor, Tensor, Tensor]:
        kv_heads = k.shape[2]
        q, dout, out, lse = (_grouped(x, kv_heads) for x in (q, dout, out, lse[..., None]))
        k, v = _heads_first(k), _heads_first(v)
        weights = self._scores(q, k, tile).sub_(lse).exp_()
        dv = torch.matmul(weights.transpose(-1, -2), dout).sum(2)
        # The softmax's gradient takes off the sum of out · dout (arXiv 2307.08691, eq. 4).
        dscores = torch.matmul(dout, v.transpose(-1, -2)).sub_((out * dout).sum(-1, keepdim=True))
        dscores.mul_(weights).mul_(self.scale)
        dk = torch.matmul(dscores.transpose(-1, -2), q).sum(2)
        return _flat(torch.matmul(dscores, k)), dk.transpose(1, 2), dv.transpose(1, 2)
