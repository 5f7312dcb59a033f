"""A rank's attention over keys that arrive in parts: float32 sums of what a kernel gives for each tile.

Shapes: B batch, C tokens of the queries' rank, T keys that have arrived, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lwm_torch_ring.attention.blocks import Tile
from lwm_torch_ring.attention.kernels.contract import Kernel


class State(NamedTuple):
    """Attention over the keys so far."""

    out: Tensor  # [B,C,H,D] float32
    lse: Tensor  # [B,C,H] float32, −inf where nothing was seen yet

    def heads(self, part: slice) -> State:
        """Of some query heads, in place."""
        return State(self.out[:, :, part], self.lse[:, :, part])


class Saved(NamedTuple):
    """What the queries bring to the backward pass."""

    q: Tensor  # [B,C,H,D]
    out: Tensor  # [B,C,H,D]
    dout: Tensor  # [B,C,H,D]
    lse: Tensor  # [B,C,H] float32, +inf where nothing was seen, so that its weights are 0

    def heads(self, part: slice) -> Saved:
        """Of some query heads."""
        return Saved(*(x[:, :, part] for x in self))


def start(q: Tensor) -> State:
    """The state before any key."""
    lse = torch.full(q.shape[:-1], -torch.inf, dtype=torch.float32, device=q.device)
    return State(torch.zeros(q.shape, dtype=torch.float32, device=q.device), lse)


def merge(state: State, out: Tensor, lse: Tensor) -> None:
    """Add to the state, in place, more keys whose own attention is ``out`` and ``lse``; weight 0 at −inf."""
    total = torch.logaddexp(state.lse, lse)
    weight = (lse - total).exp_().masked_fill_(lse.isneginf(), 0.0)
    state.out.lerp_(out.to(torch.float32), weight[..., None])
    state.lse.copy_(total)


def absorb(state: State, q: Tensor, k: Tensor, v: Tensor, tiles: Iterable[Tile], kernel: Kernel) -> None:
    """Let the queries see ``k, v [B,T,K,D]``; the state changes in place."""
    for tile in tiles:
        queries, keys = (tile.rows, tile.q), (tile.rows, tile.k)
        out, lse = kernel.forward(q[queries], k[keys], v[keys], tile)
        merge(State(state.out[queries], state.lse[queries]), out, lse)


def add_gradients(
    dq: Tensor, dk: Tensor, dv: Tensor, saved: Saved, k: Tensor, v: Tensor, tiles: Iterable[Tile], kernel: Kernel
) -> None:
    """Add the share of ``k, v [B,T,K,D]`` to dq ``[B,C,H,D]``, and theirs to dk and dv ``[B,T,K,D]``; all float32."""
    for tile in tiles:
        queries, keys = (tile.rows, tile.q), (tile.rows, tile.k)
        gradients = kernel.backward(
            saved.dout[queries], saved.q[queries], k[keys], v[keys], saved.out[queries], saved.lse[queries], tile
        )
        for whole, part, place in zip((dq, dk, dv), gradients, (queries, keys, keys), strict=True):
            whole[place] += part
