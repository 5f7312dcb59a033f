"""One token a row through all layers, on a copy of the parameters that is made for it.

A token is so little work that much of the time goes into starting operations: so matrices are cast once, those that
take the same input are one, and nothing is looked up in modules. The network itself (``model.llama``) does the same
with more operations, and goes on doing it where the copy has no room.

Shapes: B rows, E hidden size, F feed-forward size, H query heads, K key-value heads, D head dim, V vocabulary; H, K and
F are a rank's share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lwm_torch_ring.model.llama import Block, Compute, Linear, Llama, RMSNorm
from lwm_torch_ring.model.rope import RopeTables, rope_angles
from lwm_torch_ring.model.tensor_parallel import bias_share, entire, share

AttendOne = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""q ``[B,H,D]``, k and v ``[B,K,D]``, the number of the layer → out ``[B,H,D]``."""


class LayerWeights(NamedTuple):
    """Of a layer."""

    before: Tensor  # [E] float32
    qkv: Tensor  # [(H+2K)·D, E]
    qkv_bias: Tensor | None
    mix: Tensor  # [E, H·D]
    after: Tensor  # [E] float32
    gate_up: Tensor  # [2F, E]
    down: Tensor  # [E, F]


class Decoding:
    """The copy, and what it computes. The parameters must be at hand, and are not looked at again.

    Args:
        network: whose.
        how: the dtype, and the ranks of ``tp``, which all hold the one token.
        lent: the parameters are gathered for a while only, so that what needs no other form is copied too.
    """

    def __init__(self, network: Llama, how: Compute, lent: bool) -> None:
        c = network.config
        self._dtype, self._tp, self._lent = how.dtype, how.tp.whole, lent
        self._kv_heads, self._head_dim, self._eps = c.num_kv_heads // self._tp.size, c.head_dim, c.rms_norm_eps
        self._layers = [self._of(block) for block in network.blocks]
        self._norm = self._vector(network.model.norm)
        self._eps_tensor = self._norm.new_full((1, 1), c.rms_norm_eps)
        self._table = self._kept(entire(network.model.embed_tokens.weight))
        lm_head = network.lm_head
        self._head = self._table if lm_head is None else self._kept(entire(lm_head.weight))

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
        return self._kept(bias_share(linear.bias, len(share(linear.weight)), self._tp.rank))

    def logits(self, tokens: Tensor, positions: Tensor, rope: RopeTables, attend: AttendOne) -> Tensor:
        """``[B,V]`` float32 after ``tokens [B]`` at ``positions [B]``."""
        cos, sin = rope_angles(rope, positions)
        # Of both halves of a head, so that turning it takes three operations: see model.rope.rotate.
        turns = torch.cat([cos, cos], dim=-1)[:, None], torch.cat([-sin, sin], dim=-1)[:, None]
        x = functional.embedding(tokens, self._table)
        for number, w in enumerate(self._layers):
            x = self._after(x, attend(*self._heads(x, turns, w), number), w)
        return functional.linear(self._normed(x, self._norm), self._head).float()

    def _heads(self, x: Tensor, turns: tuple[Tensor, Tensor], w: LayerWeights) -> tuple[Tensor, Tensor, Tensor]:
        """q ``[B,H,D]``, k and v ``[B,K,D]`` of the stream ``[B,E]``; ``turns``: cos and sin ``[B,1,D]`` float32."""
        (cos, sin), kv, dim = turns, self._kv_heads, self._head_dim
        qkv = functional.linear(self._normed(x, w.before), w.qkv, w.qkv_bias).view(len(x), -1, dim)
        both = qkv[:, :-kv].float()
        turned = torch.addcmul(both * cos, both.roll(dim // 2, -1), sin).to(x.dtype)
        return turned[:, :-kv], turned[:, -kv:], qkv[:, -kv:]

    def _after(self, x: Tensor, out: Tensor, w: LayerWeights) -> Tensor:
        """The stream with what attention gave, ``out [B,H,D]``, and the feed-forward added."""
        x = x + self._tp.summed(functional.linear(out.flatten(1), w.mix))
        gate, up = functional.linear(self._normed(x, w.after), w.gate_up).chunk(2, dim=-1)
        return x + self._tp.summed(functional.linear(functional.silu(gate) * up, w.down))

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        if not x.is_cpu:  # one kernel there, and on a CPU a chain of more operations than these
            return functional.rms_norm(wide, weight.shape, weight, self._eps).to(x.dtype)
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        shrunk = wide * torch.addcmul(self._eps_tensor, length, length, value=1 / wide.shape[-1]).rsqrt_()
        return shrunk.mul_(weight).to(x.dtype)
