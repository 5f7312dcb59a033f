"""A decoder-only Llama whose parameters have their canonical names (``lwm_core.model``).

Computation is in ``dtype``; RMSNorm, RoPE and softmax statistics are float32. A matrix is cast to the dtype of what it
is multiplied with, unless FSDP has done so already.

Shapes: B batch, C tokens of a sequence shard, E hidden size, F feed-forward size, H query heads, K key-value heads,
D head dim, V vocabulary. Under tensor parallelism H, K and F are a rank's share, and a stream ``[B,C,E]`` its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lwm_core.model import ModelConfig
from lwm_torch_ring.model.compiled import compiled
from lwm_torch_ring.model.remat import Remat, rematerialised
from lwm_torch_ring.model.rope import RopeTables, rope_angles, rotate
from lwm_torch_ring.model.tensor_parallel import TensorParallel, bias_share, entire, share

Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""q ``[B,C,H,D]``, k and v ``[B,C,K,D]``, the number of the layer → out ``[B,C,H,D]``."""

Tail = Callable[[Tensor, Tensor], Any]
"""What is made of the stream after the last norm ``[B,C,E]`` with the output head ``[V,E]``."""


@dataclass(frozen=True)
class Compute:
    """How the network runs.

    Args:
        dtype: of activations.
        remat: what a layer keeps for its backward pass.
        token_chunk: tokens of projections and feed-forward at a time, each slice rematerialised (blockwise parallel
            transformer, arXiv 2305.19370); all at once if none.
        tp: the ranks that share heads and feed-forward.
        compile: whether a layer is one compiled program.
    """

    dtype: torch.dtype = torch.float32
    remat: Remat = "none"
    token_chunk: int | None = None
    tp: TensorParallel = field(default_factory=TensorParallel)
    compile: bool = False


class RMSNorm(nn.Module):
    """Root mean square norm over the last axis (arXiv 1910.07467), in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """``x [...,E]``, normed."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * entire(self.weight)).to(x.dtype)


class Linear(nn.Module):
    """``x @ weight.T (+ bias)`` in x's dtype; under tensor parallelism its share, by columns or by rows."""

    def __init__(self, rows: int, columns: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(columns, rows))
        self.bias = nn.Parameter(torch.empty(columns)) if bias else None

    def forward(self, x: Tensor, rank: int = 0) -> Tensor:
        """``[...,in]`` → ``[...,out]``; ``rank`` of ``tp`` says which part of the bias is meant."""
        weight = share(self.weight).to(x.dtype)
        bias = None if self.bias is None else bias_share(self.bias, len(weight), rank).to(x.dtype)
        return functional.linear(x, weight, bias)


class Attention(nn.Module):
    """Grouped-query attention; who attends, and how, is the caller's."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config
        query, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, query, c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, kv, c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, kv, c.qkv_bias)
        self.o_proj = Linear(query, c.hidden_size)
        self.head_dim = c.head_dim

    def project(self, x: Tensor, cos: Tensor, sin: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """q ``[...,H,D]``, k and v ``[...,K,D]`` of ``x [...,E]``, q and k rotated."""
        q, k, v = (p(x, rank).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def mix(self, out: Tensor) -> Tensor:
        """``[...,H,D]`` → ``[...,E]``, of this rank's heads."""
        mixed: Tensor = self.o_proj(out.flatten(-2))
        return mixed


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """``[...,E]`` → ``[...,E]``, of this rank's share of F."""
        down: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return down


def in_slices(function: Callable[..., Any], chunk: int | None, *arrays: Tensor) -> Any:
    """``function`` of slices of at most ``chunk`` tokens of the ``arrays [B,C,...]``, each rematerialised.

    Gives what the function gives, a tensor ``[B,C,...]`` or a tuple of them, of all tokens; at once without ``chunk``.
    """
    rows, tokens = arrays[0].shape[:2]
    if chunk is None or rows * tokens <= chunk:
        return function(*arrays)
    parts = zip(*(array.split(max(1, chunk // rows), dim=1) for array in arrays), strict=True)
    if not torch.is_grad_enabled():
        return _put_together(tokens, (function(*part) for part in parts))
    made = [checkpoint(function, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    if isinstance(made[0], tuple):
        return tuple(torch.cat(of_one, dim=1) for of_one in zip(*made, strict=True))
    return torch.cat(made, dim=1)


def _put_together(tokens: int, parts: Iterable[Any]) -> Any:
    """Slices as they come, each put away before the next is made: no more than one exists beside the whole."""
    whole: tuple[Tensor, ...] = ()
    done, alone = 0, False
    for part in parts:
        alone = isinstance(part, Tensor)
        of_slice = (part,) if alone else part
        if not whole:
            whole = tuple(x.new_empty((x.shape[0], tokens, *x.shape[2:])) for x in of_slice)
        for into, x in zip(whole, of_slice, strict=True):
            into[:, done : done + x.shape[1]] = x
        done += of_slice[0].shape[1]
    return whole[0] if alone else whole


class Block(nn.Module):
    """One decoder layer, pre-norm."""

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__()
        self.number = number
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, how: Compute) -> Tensor:
        """The stream ``x [B,C,E]`` with what attention and feed-forward make of it added."""
        run = self._compiled if how.compile else self._run
        return run(x, cos, sin, attend, how)

    @cached_property
    def _compiled(self) -> Callable[..., Tensor]:
        return compiled(self._run)

    def _run(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, how: Compute) -> Tensor:
        def layer(x: Tensor) -> Tensor:
            out = attend(*self.before(x, cos, sin, how), self.number)
            return self.after(x, out, how)

        return rematerialised(layer, how.remat, x)

    def before(self, x: Tensor, cos: Tensor, sin: Tensor, how: Compute) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of all ranks' tokens, heads of this rank."""

        def project(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.self_attn.project(x, cos, sin, how.tp.rank)

        normed = how.tp.together(in_slices(self.input_layernorm, how.token_chunk, x))
        q, k, v = in_slices(project, how.token_chunk, normed, cos, sin)
        return q, k, v

    def after(self, x: Tensor, out: Tensor, how: Compute) -> Tensor:
        """The stream with what attention gave, ``out [B,C,H,D]``, and the feed-forward added."""

        def feed_forward(x: Tensor) -> Tensor:
            return x + how.tp.summed(self.mlp(how.tp.together(self.post_attention_layernorm(x))))

        x = x + how.tp.summed(in_slices(self.self_attn.mix, how.token_chunk, out))
        y: Tensor = in_slices(feed_forward, how.token_chunk, x)
        return y


class Decoder(nn.Module):
    """The embedding table, the layers and the last norm: what canonical names begin ``model.`` for."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Table(config.vocabulary.size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, number) for number in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Table(nn.Module):
    """Rows ``[V,E]``: the embedding or the output head."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))


class Llama(nn.Module):
    """The whole network; logits are the tail's to compute, in slices."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None if config.tie_embeddings else Table(config.vocabulary.size, config.hidden_size)

    @property
    def blocks(self) -> Sequence[Block]:
        """The layers in order."""
        return list(self.model.layers)  # type: ignore[arg-type]

    def forward(
        self, tokens: Tensor, positions: Tensor, rope: RopeTables, attend: Attend, how: Compute, tail: Tail
    ) -> Any:
        """What ``tail`` makes of the stream after the last norm, this rank's tokens ``[B,C,E]``, and of the head.

        Args:
            tokens, positions: ``[B,C]`` of the sequence shard, the same on all ranks of ``tp``.
            rope: tables that reach beyond the largest position.
            attend: see :data:`Attend`.
            how: precision, rematerialisation, tensor parallelism.
            tail: called while the parameters are at hand.
        """
        table = entire(self.model.embed_tokens.weight)
        # Cast after the lookup, so that the rows' gradients are summed in the table's dtype.
        x = functional.embedding(how.tp.mine(tokens), table).to(how.dtype)
        cos, sin = rope_angles(rope, positions)
        for layer in self.model.layers:
            x = layer(x, cos, sin, attend, how)
        head = table if self.lm_head is None else entire(self.lm_head.weight)
        return tail(in_slices(self.model.norm, how.token_chunk, x), head)


def initial(name: str, shape: Sequence[int], config: ModelConfig, seed: int, device: torch.device) -> Tensor:
    """The first value of a parameter, the same on any mesh of like devices.

    Ones for norms, zeros for biases, else N(0, init_std²).
    """
    if name.endswith("norm.weight"):
        return torch.ones(*shape, device=device)
    if name.endswith("bias"):
        return torch.zeros(*shape, device=device)
    own = int.from_bytes(sha256(f"{seed} {name}".encode()).digest()[:7])
    generator = torch.Generator(device).manual_seed(own)
    return torch.randn(*shape, generator=generator, device=device) * config.init_std


Part = Literal["columns", "rows", "table", "whole"]


def part_of(name: str) -> Part:
    """How ``tp`` cuts a parameter: a matrix out of the stream by columns, one back into it by rows, tables by rows."""
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        return "table"
    if name.endswith("norm.weight") or name.endswith("bias"):
        return "whole"
    return "rows" if name.split(".")[-2] in ("o_proj", "down_proj") else "columns"
