"""Attention as one operator of torch around all that a strategy sends, with its gradient rule.

The forward pass saves q, k, v, out and lse and nothing else; the backward pass makes the weights again from lse. As an
operator it is one node of autograd and of a compiled graph, and a policy of selective checkpointing can keep its
result by its name, so that the ring does not run twice. The gradient of lse and second derivatives are refused.

Shapes, all of one rank: B batch, C tokens, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library

from lwm_core.errors import UnsupportedError
from lwm_torch_ring.attention.accumulate import Saved
from lwm_torch_ring.attention.peers import Peers
from lwm_torch_ring.attention.spec import AttentionSpec

FORWARD, BACKWARD, EXCHANGE = (f"lwm_torch_ring::{name}" for name in ("attention", "attention_backward", "exchange"))


@library.custom_op(
    FORWARD,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? segments, str spec) -> (Tensor, Tensor)",
)
def _forward(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, spec: str) -> tuple[Tensor, Tensor]:
    here = AttentionSpec.of(spec)
    state = here.movement.absorb(q, k, v, here, here.plan(segments))
    return state.out.to(q.dtype), state.lse


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, spec: str) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


@library.custom_op(
    BACKWARD,
    mutates_args=(),
    schema="(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? segments, Tensor out, Tensor lse, str spec)"
    " -> (Tensor, Tensor, Tensor)",
)
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, out: Tensor, lse: Tensor, spec: str
) -> tuple[Tensor, Tensor, Tensor]:
    here = AttentionSpec.of(spec)
    lse = lse.masked_fill(lse.isneginf(), torch.inf)  # a query that saw nothing has weights 0
    saved = Saved(q, out, dout.to(q.dtype), lse)
    dq, dk, dv = here.movement.gradients(saved, k, v, here, here.plan(segments))
    return dq.to(q.dtype), dk, dv


@_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, out: Tensor, lse: Tensor, spec: str
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.handle, ctx.spec = inputs[4], AttentionSpec.of(inputs[4])  # which must live as long as this


def _pull_back(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    if dlse is not None:
        raise UnsupportedError("torch-ring: lse has no gradient; use it outside of the loss, or detach it")
    if dout is None:
        return None, None, None, None, None
    q, k, v, segments, out, lse = ctx.saved_tensors
    return *_backward(dout, q, k, v, segments, out, lse, ctx.handle), None, None


def _no_second_order(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    raise UnsupportedError("torch-ring: attention has no second derivative; compute gradients without create_graph")


_forward.register_autograd(_pull_back, setup_context=_save)
_backward.register_autograd(_no_second_order)


@library.custom_op(EXCHANGE, mutates_args=(), schema="(Tensor x, str peers) -> Tensor")
def exchange(x: Tensor, peers: str) -> Tensor:
    """``[n, ...]``, part i for rank i of ``peers`` → ``[n, ...]``, part i from rank i; differentiable."""
    return Peers.of(peers).exchange(x.contiguous())


@exchange.register_fake
def _(x: Tensor, peers: str) -> Tensor:
    return x.new_empty(x.shape)


def _save_peers(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.handle, ctx.peers = inputs[1], Peers.of(inputs[1])


exchange.register_autograd(lambda ctx, dx: (exchange(dx, ctx.handle), None), setup_context=_save_peers)


def attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, spec: AttentionSpec, lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """out ``[B,C,H,D]`` in q's dtype and natural-log lse ``[B,C,H]`` float32 of one rank's queries over all keys.

    Args:
        segments: ``[B,S/n]`` of this process, whatever the tokens that q has.
        lse: whether lse is wanted too.

    Raises:
        UnsupportedError: on the way back, where lse has a gradient or a second derivative is asked for.
        PeerLost: a transfer did not come about.
    """
    out, sums = _forward(q, k, v, segments, spec.handle)
    return out, sums if lse else None
