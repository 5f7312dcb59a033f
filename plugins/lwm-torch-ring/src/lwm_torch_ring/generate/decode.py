"""One token a row through all layers, on a copy of the parameters that is made for it.

A token is so little work that much of the time goes into starting operations: so matrices are cast once, those that
take the same input are one, and nothing is looked up in modules. The network itself (``model.llama``) does the same
with more operations, and goes on doing it where the copy has no room.

Shapes: B rows, E hidden size, F feed-forward size, H query heads, K key-value heads, D head dim, V vocabulary; H, K and
F are a rank's share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lwm_torch_ring.model.compiled import compiled
from lwm_torch_ring.model.llama import Block, Compute, Linear, Llama, RMSNorm
from lwm_torch_ring.model.rope import RopeTables, rope_angles
from lwm_torch_ring.model.tensor_parallel import TensorParallel, bias_share, entire, share

AttendOne = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""q ``[B,1,H,D]``, k and v ``[B,1,K,D]``, the number of the layer → out ``[B,1,H,D]``."""


class LayerWeights(NamedTuple):
    """Of a layer."""

    before: Tensor  # [E] float32
    qkv: Tensor  # [(H+2K)·D, E]
    qkv_bias: Tensor | None
    mix: Tensor  # [E, H·D]
    after: Tensor  # [E] float32
    gate_up: Tensor  # [2F, E]
    down: Tensor  # [E, F]


class Form(NamedTuple):
    """What the numbers of a layer mean."""

    kv_heads: int
    head_dim: int
    eps: float
    tp: TensorParallel


class Decoding:
    """The copy, and what it computes. The parameters must be at hand, and are not looked at again.

    Args:
        network: whose.
        how: the dtype; whether what lies between two layers' attention is one compiled program; and the ranks of
            ``tp``, which all hold the one token.
        lent: the parameters are gathered for a while only, so that what needs no other form is copied too.
    """

    def __init__(self, network: Llama, how: Compute, lent: bool) -> None:
        c, tp = network.config, how.tp.whole
        self._form = Form(c.num_kv_heads // tp.size, c.head_dim, c.rms_norm_eps, tp)
        self._dtype, self._lent = how.dtype, lent
        self._layers = [self._of(block) for block in network.blocks]
        self._norm = self._vector(network.model.norm)
        self._table = self._kept(entire(network.model.embed_tokens.weight))
        lm_head = network.lm_head
        self._head = self._table if lm_head is None else self._kept(entire(lm_head.weight))
        steps: Sequence[Callable[..., Any]] = (_begin, _between, _end)
        if how.compile:
            steps = [compiled(step, "compile_decoding") for step in steps]
        self._begin, self._between, self._end = steps

    def _kept(self, x: Tensor) -> Tensor:
        return x.detach().to(self._dtype, copy=self._lent)

    def _vector(self, norm: RMSNorm) -> Tensor:
        return entire(norm.weight).detach().to(torch.float32, copy=self._lent)

    def _of(self, block: Block) -> LayerWeights:
        a, f = block.self_attn, block.mlp
        qkv = (a.q_proj, a.k_proj, a.v_proj)
        biases = [self._bias(one) for one in qkv if one.bias is not None]
        return LayerWeights(
            self._vector(block.input_layernorm),
            torch.cat([self._matrix(one) for one in qkv]),
            torch.cat(biases) if biases else None,
            self._matrix(a.o_proj),
            self._vector(block.post_attention_layernorm),
            torch.cat([self._matrix(f.gate_proj), self._matrix(f.up_proj)]),
            self._matrix(f.down_proj),
        )

    def _matrix(self, linear: Linear) -> Tensor:
        return self._kept(share(linear.weight))

    def _bias(self, linear: Linear) -> Tensor:
        assert linear.bias is not None
        return self._kept(bias_share(linear.bias, len(share(linear.weight)), self._form.tp.rank))

    def logits(self, tokens: Tensor, positions: Tensor, rope: RopeTables, attend: AttendOne) -> Tensor:
        """``[B,V]`` float32 after ``tokens [B]`` at ``positions [B]``."""
        layers, form = self._layers, self._form
        angles = rope_angles(rope, positions)
        x, turns, qkv = self._begin(tokens, angles, self._table, layers[0], form)
        for number, (layer, following) in enumerate(pairwise(layers)):
            x, qkv = self._between(x, attend(*qkv, number), turns, layer, following, form)
        logits: Tensor = self._end(x, attend(*qkv, len(layers) - 1), layers[-1], self._norm, self._head, form)
        return logits


Turns = tuple[Tensor, Tensor]
"""cos and sin ``[B,1,D]`` float32 of both halves of a head, so that turning it takes three operations; ``model.rope``
says what it is."""

Heads = tuple[Tensor, Tensor, Tensor]
"""q ``[B,1,H,D]``, k and v ``[B,1,K,D]``."""


def _begin(
    tokens: Tensor, angles: Turns, table: Tensor, layer: LayerWeights, form: Form
) -> tuple[Tensor, Turns, Heads]:
    """From tokens to the first layer's attention: the stream ``[B,E]``, what turns heads, and the heads."""
    cos, sin = angles
    turns = torch.cat([cos, cos], dim=-1)[:, None], torch.cat([-sin, sin], dim=-1)[:, None]
    x = functional.embedding(tokens, table)
    return x, turns, _heads(x, turns, layer, form)


def _between(
    x: Tensor, out: Tensor, turns: Turns, layer: LayerWeights, following: LayerWeights, form: Form
) -> tuple[Tensor, Heads]:
    """From a layer's attention to the next one's."""
    x = _after(x, out, layer, form)
    return x, _heads(x, turns, following, form)


def _end(x: Tensor, out: Tensor, layer: LayerWeights, norm: Tensor, head: Tensor, form: Form) -> Tensor:
    """From the last layer's attention to the logits."""
    return functional.linear(_normed(_after(x, out, layer, form), norm, form.eps), head).float()


def _heads(x: Tensor, turns: Turns, w: LayerWeights, form: Form) -> Heads:
    cos, sin = turns
    kv, dim = form.kv_heads, form.head_dim
    qkv = functional.linear(_normed(x, w.before, form.eps), w.qkv, w.qkv_bias).unflatten(-1, (-1, dim))
    both = qkv[:, :-kv].float()
    turned = torch.addcmul(both * cos, both.roll(dim // 2, -1), sin).to(x.dtype)[:, None]
    return turned[:, :, :-kv], turned[:, :, -kv:], qkv[:, None, -kv:]


def _after(x: Tensor, out: Tensor, w: LayerWeights, form: Form) -> Tensor:
    x = x + form.tp.summed(functional.linear(out.flatten(1), w.mix))
    gate, up = functional.linear(_normed(x, w.after, form.eps), w.gate_up).chunk(2, dim=-1)
    return x + form.tp.summed(functional.linear(functional.silu(gate) * up, w.down))


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)
