"""Attention of new tokens over what is in the cache, wherever it lies.

Each rank of ``sp`` holds a part of every row. *pass-Q* brings the queries to the keys: all ranks' queries are gathered,
each attends to its own part, and the partial results go back to be merged. *pass-KV* sends the parts round the ranks,
past the queries. Whichever moves fewer bytes is taken (arXiv 2411.01783); a single query always goes to the keys.

Shapes: B rows, c new tokens of this rank, T cached slots of a rank, H query heads, K key-value heads, D head dim;
n ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lwm_torch_ring.attention.accumulate import State, merge, start
from lwm_torch_ring.attention.kernels.aten import CpuFlash
from lwm_torch_ring.attention.kernels.contract import Kernel
from lwm_torch_ring.attention.peers import Parcel, Peers
from lwm_torch_ring.attention.tiles import Tile
from lwm_torch_ring.generate.cache import LayerCache

CPU_FLASH = CpuFlash()


def over_cache(q: Tensor, layer: LayerCache, cached: Sequence[Sequence[int]], peers: Peers, kernel: Kernel) -> State:
    """out ``[B,c,H,D]`` and lse ``[B,c,H]`` of ``q [B,c,H,D]`` over all cached tokens of its rows.

    Args:
        cached: slots in use of each row, ``[n][B]``, of every rank.
        kernel: computes a whole tile.
    """
    longest = max(max(used) for used in cached)
    moved = q[0].numel() * (q.element_size() + 4)
    kept = 2 * longest * layer.k.whole(0).shape[2] * q.shape[3] * q.element_size()
    if peers.size == 1 or moved <= kept:
        return _pass_q(q, layer, cached, peers, kernel)
    return _pass_kv(q, layer, cached, peers, kernel)


def _pass_q(q: Tensor, layer: LayerCache, cached: Sequence[Sequence[int]], peers: Peers, kernel: Kernel) -> State:
    here = cached[peers.rank]
    k, v = (rows.whole(max(here)) if max(here) else None for rows in (layer.k, layer.v))
    if peers.size == 1:
        return _over_rows(start(q), q, k, v, here, kernel)
    everyone, pending = peers.gather(q)
    pending.wait()
    partial = []
    for queries in everyone:
        state = _over_rows(start(queries), queries, k, v, here, kernel)
        partial.append(torch.cat([state.out, state.lse[..., None]], dim=-1))
    mine = peers.exchange(torch.stack(partial))
    total = State(mine[0, ..., :-1].contiguous(), mine[0, ..., -1].contiguous())
    for part in mine[1:]:
        merge(total, part[..., :-1], part[..., -1])
    return total


def _pass_kv(q: Tensor, layer: LayerCache, cached: Sequence[Sequence[int]], peers: Peers, kernel: Kernel) -> State:
    longest = max(max(used) for used in cached)
    mine = q.new_zeros((2, q.shape[0], longest, *layer.k.whole(0).shape[2:]))
    for into, rows in zip(mine, (layer.k, layer.v), strict=True):
        have = max(rows.used, default=0)
        if have:
            into[:, :have] = rows.whole(have)
    state = start(q)
    for hop in range(peers.size):
        if hop + 1 < peers.size:
            coming = torch.empty_like(mine)
            pending = peers.post(Parcel(mine, 1, coming))
        _over_rows(state, q, mine[0], mine[1], cached[(peers.rank - hop) % peers.size], kernel)
        if hop + 1 < peers.size:
            pending.wait()
            mine = coming
    return state


def _over_rows(
    state: State, q: Tensor, k: Tensor | None, v: Tensor | None, used: Sequence[int], kernel: Kernel
) -> State:
    """Let ``q`` see the first ``used[b]`` slots of each row; rows of one length at once."""
    if k is None or v is None:
        return state
    groups = [slice(0, len(used))] if len(set(used)) == 1 else [slice(row, row + 1) for row in range(len(used))]
    for rows in groups:
        slots = used[rows.start]
        if slots:
            tile = Tile(slice(None), slice(0, q.shape[1]), slice(0, slots), "whole")
            out, lse = kernel.forward(q[rows], k[rows, :slots], v[rows, :slots], tile)
            merge(State(state.out[rows], state.lse[rows]), out, lse)
    return state


def one_query(q: Tensor, layer: LayerCache, peers: Peers) -> Tensor:
    """``[B,H,D]`` in q's dtype: one query a row, ``q [B,H,D]``, over all cached tokens of its row, its own among them.

    Each rank attends to its part; out and lse of all are brought together. There is no ring a token.
    """
    used = layer.used
    slots = max(used, default=0)
    if slots:
        seen = None
        if min(used) < slots:
            seen = torch.arange(slots, device=q.device) < torch.tensor(used, device=q.device)[:, None]
        out, lse = _attend(q, layer.k.by_heads(slots), layer.v.by_heads(slots), seen)
    else:
        out, lse = q.float() * 0, torch.full(q.shape[:2], -torch.inf, device=q.device)
    if peers.size > 1:
        gathered, pending = peers.gather(torch.cat([out, lse[..., None]], dim=-1))
        pending.wait()
        weights = torch.softmax(gathered[..., -1:], dim=0)
        out = (gathered[..., :-1] * weights).sum(0)
    return out.to(q.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
    """out ``[B,H,D]`` and lse ``[B,H]``, float32, of ``k, v [B,K,T,D]``; 0 and −inf for a row that sees nothing."""
    rows, heads, dim = q.shape
    grouped = q.view(rows, k.shape[1], -1, dim)
    if seen is None and q.dtype == torch.float32 and not CPU_FLASH.objection(q.device, q.dtype, dim):
        # The heads of a group as queries of one head: each key is read once, and no score is kept.
        out, lse = CPU_FLASH.by_heads(grouped, k, v, dim**-0.5, False, None)
        return out.reshape(rows, heads, dim), lse.reshape(rows, heads)
    scores = torch.einsum("bkgd,bksd->bkgs", grouped, k).float() * dim**-0.5
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
        v = v.masked_fill(~seen[:, None, :, None], 0.0)  # what lies there may be no number
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse.isneginf(), 0.0)[..., None])
    out = torch.einsum("bkgs,bksd->bkgd", weights.to(v.dtype), v).float()
    return out.reshape(rows, heads, dim), lse.reshape(rows, heads)
