"""Kernels ``cpu-flash``, ``cuda-flash``, ``cudnn`` and ``flash-attn-3``: whole and diagonal tiles without any mask.

Where a fused attention takes sequences of many lengths, the tiles of packed documents go to it in one call.

A ragged tile goes to it with a float mask where it takes one, and else to the kernel ``math``.

Shapes: B rows, c queries and t keys of a tile, Q queries and T keys of a pack, H query heads, K key-value heads, D
head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lwm_torch_ring.attention.kernels.contract import unseeing, visible
from lwm_torch_ring.attention.kernels.fused import Fused, Varlen
from lwm_torch_ring.attention.kernels.math import MathKernel
from lwm_torch_ring.attention.tiles import Spans, Tile


def _bias(tile: Tile, device: torch.device) -> Tensor | None:
    """``[c, t]`` float32: 0 where a query sees a key, else −inf; none where the tile is not ragged."""
    if tile.kind != "ragged":
        return None
    seen = visible(tile, device)
    assert seen is not None
    return torch.zeros(seen.shape, device=device).masked_fill_(~seen, -torch.inf)


@dataclass(frozen=True)
class VarlenKernel:
    """See :class:`~lwm_torch_ring.attention.kernels.contract.PackKernel`."""

    scale: float
    varlen: Varlen

    def forward(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, diagonal: bool) -> tuple[Tensor, Tensor]:
        return self.varlen.forward(q, k, v, spans, self.scale, diagonal)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans, diagonal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.varlen.backward(dout, q, k, v, out, lse, spans, self.scale, diagonal)


@dataclass(frozen=True)
class FlashKernel:
    """See :class:`~lwm_torch_ring.attention.kernels.contract.Kernel`.

    Args:
        scale: softmax scale.
        chunk: longest side of a ragged tile.
        fused: the fused attention of a device.
    """

    scale: float
    chunk: int
    fused: Fused
    limit: ClassVar[None] = None

    @property
    def name(self) -> str:
        """As the option ``kernel`` has it."""
        return self.fused.name

    @property
    def packed(self) -> VarlenKernel | None:
        """Where the fused attention takes sequences of many lengths."""
        varlen = self.fused.varlen
        return VarlenKernel(self.scale, varlen) if varlen is not None and not varlen.objection() else None

    def _plain(self, tile: Tile) -> MathKernel | None:
        """The kernel for tiles that the fused attention does not take."""
        return MathKernel(self.scale, self.chunk) if tile.kind == "ragged" and not self.fused.masks else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        plain = self._plain(tile)
        if plain is not None:
            return plain.forward(q, k, v, tile)
        out, lse = self.fused.forward(q, k, v, self.scale, tile.kind == "diagonal", _bias(tile, q.device))
        nothing = unseeing(tile, q.device)
        if nothing is not None:
            out = out.masked_fill(nothing[:, None, None], 0.0)
            lse = lse.masked_fill(nothing[:, None], -torch.inf)
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tile: Tile
    ) -> tuple[Tensor, Tensor, Tensor]:
        plain = self._plain(tile)
        if plain is not None:
            return plain.backward(dout, q, k, v, out, lse, tile)
        bias = _bias(tile, q.device)
        return self.fused.backward(dout, q, k, v, out, lse, self.scale, tile.kind == "diagonal", bias)
