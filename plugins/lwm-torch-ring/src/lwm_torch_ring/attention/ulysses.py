"""Strategies ``ulysses`` and ``usp``: ranks exchange heads for tokens, so that each sees more of the sequence at once.

DeepSpeed Ulysses (arXiv 2309.14509): an all-to-all gives each process every token of a few heads, attention needs
nothing from the others, and a second all-to-all gives the tokens back. It moves less than a ring but needs a head a
process. USP (arXiv 2405.07719) does it among ``inner`` neighbours, which then are one rank of a ring among the rest.

q, k and v travel in one transfer, out in another; and so do their gradients.

Shapes, of one process: B batch, C tokens, H query heads, K key-value heads, D head dim; n = inner.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lwm_core.attention_cost import repeated_kv_heads
from lwm_torch_ring.attention.differentiable import attention, exchange
from lwm_torch_ring.attention.peers import Peers
from lwm_torch_ring.attention.spec import AttentionSpec


def repeat_kv_heads(q: Tensor, k: Tensor, v: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    """k and v with their heads repeated where ``ranks`` does not divide them.

    Raises:
        UnsupportedError: the query heads do not divide over the ranks, or the copies over the query heads.
    """
    heads, kv_heads = q.shape[2], k.shape[2]
    times = repeated_kv_heads(heads, kv_heads, ranks) // kv_heads
    if times == 1:
        return k, v

    def copies(x: Tensor) -> Tensor:
        # By way of float32, in which the gradients of the copies are added up then.
        return x.float().repeat_interleave(times, 2).to(x.dtype)

    return copies(k), copies(v)


def _to_heads(x: Tensor, inner: Peers) -> Tensor:
    """``[B,C,n,h,D]`` → ``[B,n·C,h,D]``."""
    return exchange(x.permute(2, 0, 1, 3, 4), inner.handle).transpose(0, 1).flatten(1, 2)


def _to_tokens(x: Tensor, inner: Peers) -> Tensor:
    """``[B,n·C,h,D]`` → ``[B,C,n·h,D]``."""
    parts = x.unflatten(1, (inner.size, -1)).transpose(0, 1)
    return exchange(parts, inner.handle).permute(1, 2, 0, 3, 4).flatten(2, 3)


def exchanged_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, spec: AttentionSpec, lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """As :func:`~lwm_torch_ring.attention.differentiable.attention`, with heads and tokens exchanged around it.

    Raises:
        UnsupportedError: the heads do not divide over the neighbours.
    """
    inner = spec.peers.inner
    if inner.size == 1:
        return attention(q, k, v, segments, spec, lse)
    k, v = repeat_kv_heads(q, k, v, inner.size)
    dealt = [x.unflatten(2, (inner.size, -1)) for x in (q, k, v)]
    together = _to_heads(torch.cat(dealt, dim=3), inner)
    q, k, v = together.split([x.shape[3] for x in dealt], dim=2)
    out, sums = attention(q, k, v, segments, spec, lse)
    return _to_tokens(out, inner), None if sums is None else _to_tokens(sums[..., None], inner)[..., 0]
