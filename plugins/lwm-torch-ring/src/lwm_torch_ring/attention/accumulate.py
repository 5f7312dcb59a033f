"""A rank's attention over keys that arrive in parts: float32 sums of what a kernel gives for each tile.

Shapes: B batch, C tokens of the queries' rank, T keys that have arrived, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lwm_torch_ring.attention.kernels.contract import Kernel, PackKernel
from lwm_torch_ring.attention.tiles import Pack, Tile


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


def _tokens(x: Tensor) -> Tensor:
    """``[B,C,...]`` → ``[B·C,...]``; a view wherever the strides allow one."""
    return x.reshape(-1, *x.shape[2:])


def _packer(kernel: Kernel) -> PackKernel:
    assert kernel.packed is not None  # else its plan has no packs
    return kernel.packed


def absorb(state: State, q: Tensor, k: Tensor, v: Tensor, tiles: Iterable[Tile | Pack], kernel: Kernel) -> None:
    """Let the queries see ``k, v [B,T,K,D]``; the state changes in place."""
    for tile in tiles:
        if isinstance(tile, Pack):
            _absorb_pack(state, q, k, v, tile, _packer(kernel))
            continue
        queries, keys = (tile.rows, tile.q), (tile.rows, tile.k)
        out, lse = kernel.forward(q[queries], k[keys], v[keys], tile)
        merge(State(state.out[queries], state.lse[queries]), out, lse)


def _absorb_pack(state: State, q: Tensor, k: Tensor, v: Tensor, pack: Pack, kernel: PackKernel) -> None:
    queries, keys, spans = pack.on(q.device)
    given = _tokens(q)[queries], _tokens(k)[keys], _tokens(v)[keys]
    out, lse = kernel.forward(*given, spans, pack.kind == "diagonal")
    whole = State(*(x.view(-1, *x.shape[2:]) for x in state))
    part = State(*(x[queries] for x in whole))
    merge(part, out, lse)
    if not isinstance(queries, slice):  # what was gathered is a copy; no query is in it twice
        for x, merged in zip(whole, part, strict=True):
            x[queries] = merged


def add_gradients(
    dq: Tensor, dk: Tensor, dv: Tensor, saved: Saved, k: Tensor, v: Tensor, tiles: Iterable[Tile | Pack],
    kernel: Kernel,
) -> None:  # fmt: skip
    """Add the share of ``k, v [B,T,K,D]`` to dq ``[B,C,H,D]``, and theirs to dk and dv ``[B,T,K,D]``; all float32."""
    for tile in tiles:
        if isinstance(tile, Pack):
            _add_pack(dq, dk, dv, saved, k, v, tile, _packer(kernel))
            continue
        queries, keys = (tile.rows, tile.q), (tile.rows, tile.k)
        gradients = kernel.backward(
            saved.dout[queries], saved.q[queries], k[keys], v[keys], saved.out[queries], saved.lse[queries], tile
        )
        for whole, part, place in zip((dq, dk, dv), gradients, (queries, keys, keys), strict=True):
            whole[place] += part


def _add_pack(
    dq: Tensor, dk: Tensor, dv: Tensor, saved: Saved, k: Tensor, v: Tensor, pack: Pack, kernel: PackKernel
) -> None:
    queries, keys, spans = pack.on(k.device)
    q, out, dout, lse = (_tokens(x)[queries] for x in saved)
    given = dout, q, _tokens(k)[keys], _tokens(v)[keys], out, lse
    gradients = kernel.backward(*given, spans, pack.kind == "diagonal")
    for whole, part, place in zip((dq, dk, dv), gradients, (queries, keys, keys), strict=True):
        whole = whole.view(-1, *whole.shape[2:])
        if isinstance(place, slice):
            whole[place] += part
        else:
            whole.index_add_(0, place, part.to(whole.dtype))
