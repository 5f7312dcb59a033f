"""The KV cache: the prompt's part stays where prefill left it, spread over ``sp``; new tokens have a part of their own.

Every slot of the prompt carries its token's index, so that nothing infers order from a slot.

Shapes: B rows, P prompt slots of this rank, N new slots, K key-value heads, H query heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lwm_torch_ring.attention.peers import Peers


@dataclass
class LayerCache:
    """Keys and values of one layer: of the prompt ``[B,P,K,D]`` and of new tokens ``[B,N,K,D]``."""

    prompt_k: Tensor
    prompt_v: Tensor
    new_k: Tensor
    new_v: Tensor

    @classmethod
    def after_prefill(cls, k: Tensor, v: Tensor, count: int) -> LayerCache:
        """The prompt's, with room for ``count`` new tokens."""
        room = (k.shape[0], count, *k.shape[2:])
        return cls(k, v, k.new_zeros(room), v.new_zeros(room))

    def add(self, k: Tensor, v: Tensor, step: int) -> None:
        """Put away new token number ``step``, ``[B,1,K,D]``."""
        self.new_k[:, step : step + 1] = k
        self.new_v[:, step : step + 1] = v


def attend_cached(q: Tensor, layer: LayerCache, prompt_index: Tensor, step: int, peers: Peers) -> Tensor:
    """One query a row over a layer's prompt, wherever it lies, and its new tokens up to and including ``step``.

    Each rank attends to what it holds; out and lse of all are brought together. New tokens, which all ranks hold,
    count on the first.

    Args:
        q: ``[B,1,H,D]``.
        prompt_index: ``[B,P]``; slots of −1 are not seen.
        peers: the ranks of ``sp``.

    Returns:
        ``[B,1,H,D]`` in q's dtype.
    """
    keys, values, seen = layer.prompt_k, layer.prompt_v, prompt_index >= 0
    if peers.rank == 0:
        keys = torch.cat([keys, layer.new_k[:, : step + 1]], dim=1)
        values = torch.cat([values, layer.new_v[:, : step + 1]], dim=1)
        seen = torch.cat([seen, seen.new_ones(seen.shape[0], step + 1)], dim=1)
    out, lse = _attend(q, keys, values, seen)
    if peers.size > 1:
        gathered, pending = peers.gather(torch.cat([out, lse[..., None]], dim=-1))
        pending.wait()
        weights = torch.softmax(gathered[..., -1:], dim=0)
        out = (gathered[..., :-1] * weights).sum(0)
    return out.to(q.dtype)[:, None]


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """out ``[B,H,D]`` and lse ``[B,H]``, float32; 0 and −inf for a row that sees nothing."""
    rows, _, heads, dim = q.shape
    grouped = q.view(rows, k.shape[2], heads // k.shape[2], dim)
    scores = torch.einsum("bkgd,bskd->bkgs", grouped, k).float() * dim**-0.5
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse.isneginf(), 0.0)[..., None])
    out = torch.einsum("bkgs,bskd->bkgd", weights.to(v.dtype), v).float()
    return out.reshape(rows, heads, dim), lse.view(rows, heads)
