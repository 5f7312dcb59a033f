"""Rotary embedding in float32, exact to a float32 ulp at any position.

A float32 angle of a million radians is off by up to 0.03. So a position is split into ``1024·high + low``, the cosines
and sines of both parts come from two small tables made in float64, and the angle addition theorem joins them.

Shapes: B batch, C tokens, N heads, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lwm_core.rope import RopeSpec

LOW = 1024


class RopeTables(NamedTuple):
    """Cosines and sines of both parts of a position, float32 ``[LOW or more positions / LOW, D/2]``."""

    cos_low: Tensor
    sin_low: Tensor
    cos_high: Tensor
    sin_high: Tensor


def rope_tables(rope: RopeSpec, head_dim: int, max_position: int, device: torch.device) -> RopeTables:
    """The tables for positions in ``[0, max_position)``, the attention factor included."""
    frequencies = rope.inverse_frequencies(head_dim)
    low = np.arange(LOW)[:, None] * frequencies
    high = np.arange(-(-max_position // LOW))[:, None] * (LOW * frequencies)
    factor = rope.attention_factor
    tables = (np.cos(low), np.sin(low), np.cos(high) * factor, np.sin(high) * factor)
    return RopeTables(*(torch.from_numpy(table.astype(np.float32)).to(device) for table in tables))


def rope_angles(tables: RopeTables, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin ``[B,C,D/2]`` float32 for ``positions [B,C]``, times the attention factor."""
    low, high = positions % LOW, positions // LOW
    cl, sl, ch, sh = tables.cos_low[low], tables.sin_low[low], tables.cos_high[high], tables.sin_high[high]
    return ch * cl - sh * sl, sh * cl + ch * sl


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of each head of ``x [...,N,D]`` by angles ``[...,D/2]``: in float32, back in x's dtype."""
    first, second = x.float().chunk(2, dim=-1)
    c, s = cos[..., None, :], sin[..., None, :]
    return torch.cat([first * c - second * s, second * c + first * s], dim=-1).to(x.dtype)
