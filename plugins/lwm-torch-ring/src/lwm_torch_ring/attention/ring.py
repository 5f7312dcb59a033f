"""Strategy ``ring``: keys and values travel round the ``sp`` axis while every rank's queries stay.

Ring Attention with Blockwise Transformers (arXiv 2310.01889). K and V are one tensor on the way, in two buffers that
change places. The backward pass sends them round again; float32 dK and dV follow one hop behind, so that they too
travel while something is computed.

Transfers for n ranks: forward n−1 of K and V in their own dtype; backward n−1 of K and V, n−1 of float32 dK and dV and
one of the finished dK and dV in the dtype of K; none at n = 1. All but the last are posted before the compute that
hides them. Hops that a window leaves nothing to do for are jumped over.

Shapes, of one rank: B batch, C tokens, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lwm_torch_ring.attention.accumulate import Saved, State, absorb, add_gradients, start
from lwm_torch_ring.attention.blocks import Plan
from lwm_torch_ring.attention.peers import Parcel
from lwm_torch_ring.attention.spec import AttentionSpec, Movement


def _ahead(spec: AttentionSpec, number: int) -> int:
    """How far keys go from needed hop ``number`` to the next."""
    return spec.hops[number + 1] - spec.hops[number]


def _absorb(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, plan: Plan) -> State:
    """The state after one round."""
    state, last = start(q), len(spec.hops) - 1
    here = torch.stack((k, v)) if last else None  # [2,B,C,K,D]
    spare = torch.empty_like(here) if here is not None else None
    for number, hop in enumerate(spec.hops):
        pending = None
        if here is not None and spare is not None and number < last:
            pending = spec.peers.ring.post(Parcel(here, _ahead(spec, number), spare))
        keys = (k, v) if here is None else here
        absorb(state, q, keys[0], keys[1], plan.tiles((spec.rank - hop) % spec.world), spec.kernel)
        if pending is not None:
            pending.wait()
            here, spare = spare, here
    return state


def _gradients(saved: Saved, k: Tensor, v: Tensor, spec: AttentionSpec, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """dq, and dk and dv brought home, after one more round."""
    hops, ring = spec.hops, spec.peers.ring
    dq = torch.zeros(saved.q.shape, dtype=torch.float32, device=k.device)
    last = len(hops) - 1
    here = torch.stack((k, v))  # [2,B,C,K,D]
    spare = torch.empty_like(here) if last else here
    behind: Tensor | None = None  # [2,B,C,K,D] float32: what the ranks before have added for the keys of the last hop
    for number, hop in enumerate(hops):
        parcels, arriving = [], None
        if number < last:
            parcels.append(Parcel(here, _ahead(spec, number), spare))
        if behind is not None:
            arriving = torch.empty_like(behind)
            parcels.append(Parcel(behind, _ahead(spec, number - 1), arriving))
        pending = ring.post(*parcels) if parcels else None
        mine = torch.zeros(here.shape, dtype=torch.float32, device=k.device)
        tiles = plan.tiles((spec.rank - hop) % spec.world)
        add_gradients(dq, mine[0], mine[1], saved, here[0], here[1], tiles, spec.kernel)
        if pending is not None:
            pending.wait()
        behind = mine if arriving is None else arriving.add_(mine)
        here, spare = spare, here
    assert behind is not None
    whole = behind.to(k.dtype)  # nothing is added any more, so that it goes home as it is given back
    if hops[-1] % spec.world:
        home = torch.empty_like(whole)
        ring.post(Parcel(whole, -hops[-1], home)).wait()
        whole = home
    return dq, whole[0].clone(), whole[1].clone()  # an operator's results share no memory


RING = Movement(_absorb, _gradients)
