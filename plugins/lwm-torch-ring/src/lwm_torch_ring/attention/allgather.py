"""Strategy ``allgather``: every rank fetches all keys and values, and keeps its queries.

Llama 3's context parallelism (arXiv 2407.21783, section 3.3.2). One gather instead of n−1 hops, which wins where hops
are too short to be hidden or documents leave most of them nothing to do; each rank then holds the keys of the whole
sequence, so that memory grows with it. ``gather_heads`` bounds that: so many key-value heads at a time, the next ones
on their way while these are computed with. The backward pass gathers again, and sums float32 dK and dV where they
belong.

Shapes, of one rank: B batch, C tokens, H query heads, K key-value heads, D head dim; n ranks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lwm_torch_ring.attention.accumulate import Saved, State, absorb, add_gradients, start
from lwm_torch_ring.attention.blocks import Plan
from lwm_torch_ring.attention.spec import AttentionSpec, Movement


def _arrivals(k: Tensor, v: Tensor, heads: int, spec: AttentionSpec) -> Iterator[tuple[slice, slice, Tensor]]:
    """(key-value heads, their query heads, ``[n,2,B,C,h,D]`` of their k and v), the next gathered meanwhile."""
    kv_heads = k.shape[2]
    stride, group = spec.gather_heads or kv_heads, heads // kv_heads
    parts = [slice(at, min(at + stride, kv_heads)) for at in range(0, kv_heads, stride)]

    def fetch(part: slice):  # type: ignore[no-untyped-def]
        return spec.peers.ring.gather(torch.stack((k[:, :, part], v[:, :, part])))

    coming = fetch(parts[0])
    for number, part in enumerate(parts):
        (here, pending), coming = coming, None
        pending.wait()
        if number + 1 < len(parts):
            coming = fetch(parts[number + 1])
        yield part, slice(part.start * group, part.stop * group), here


def _absorb(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, plan: Plan) -> State:
    state = start(q)
    for _, heads, keys in _arrivals(k, v, q.shape[2], spec):
        for source in range(spec.world):
            k_all, v_all = keys[source]
            absorb(state.heads(heads), q[:, :, heads], k_all, v_all, plan.tiles(source), spec.kernel)
    return state


def _gradients(saved: Saved, k: Tensor, v: Tensor, spec: AttentionSpec, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    dq = torch.zeros(saved.q.shape, dtype=torch.float32, device=k.device)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    for part, heads, keys in _arrivals(k, v, saved.q.shape[2], spec):
        mine = torch.zeros(keys.shape, dtype=torch.float32, device=k.device)
        some = saved.heads(heads)
        for source in range(spec.world):
            (k_all, v_all), (dk_all, dv_all) = keys[source], mine[source]
            add_gradients(dq[:, :, heads], dk_all, dv_all, some, k_all, v_all, plan.tiles(source), spec.kernel)
        dk[:, :, part], dv[:, :, part] = spec.peers.ring.scatter_sum(mine)
    return dq, dk, dv


ALLGATHER = Movement(_absorb, _gradients)
