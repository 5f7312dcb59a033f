"""A decoder-only Llama in flax nnx, its layers stacked and scanned.

Computation is in ``compute_dtype``; parameters, RMSNorm, RoPE and softmax statistics are float32. Linear kernels are
``[in, out]`` here and ``[out, in]`` under their canonical names (``names.py``).

Shapes: B batch, S sequence, E hidden size, F feed-forward size, H query heads, K key-value heads, D head dim,
L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from lwm_core.model import ModelConfig
from lwm_jax_ring.attention.differentiable import LSE_NAME, OUT_NAME
from lwm_jax_ring.model.rope import RopeTables, rope_angles, rotate

Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
"""q ``[B,S,H,D]``, k and v ``[B,S,K,D]``, what the layer was given → out ``[B,S,H,D]``, what the layer keeps.

Training is given nothing and keeps nothing; prefill keeps k and v; decoding is given a layer's cache."""

Constrain = Callable[[jax.Array], jax.Array]
"""Pins the sharding of the residual stream ``[B,S,E]``."""

REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(OUT_NAME, LSE_NAME),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What a layer keeps for its backward pass. ``attention`` keeps out and lse, so that the ring never runs twice."""


class RMSNorm(nnx.Module):
    """Root mean square norm over the last axis (arXiv 1910.07467), in float32."""

    def __init__(self, size: int, eps: float) -> None:
        self.weight = nnx.Param(jnp.ones((size,), jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * self.weight[...]).astype(x.dtype)


class Linear(nnx.Module):
    """``x @ kernel (+ bias)`` in x's dtype; the kernel ``[in, out]`` is drawn from N(0, std²)."""

    def __init__(self, rows: int, columns: int, std: float, rngs: nnx.Rngs, bias: bool = False) -> None:
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (rows, columns), jnp.float32) * std)
        self.bias = nnx.Param(jnp.zeros((columns,), jnp.float32)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention; who attends, and how, is the caller's."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        c, std = config, config.init_std
        query, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, query, std, rngs, c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, kv, std, rngs, c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, kv, std, rngs, c.qkv_bias)
        self.o_proj = Linear(query, c.hidden_size, std, rngs)
        self.head_dim = c.head_dim

    def __call__(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, attend: Attend, given: Any
    ) -> tuple[jax.Array, Any]:
        rows, length = x.shape[:2]
        q, k, v = (p(x).reshape(rows, length, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        out, kept = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, given)
        return self.o_proj(out.reshape(rows, length, -1)), kept


class FeedForward(nnx.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        c, std = config, config.init_std
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, std, rngs)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, std, rngs)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, std, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Chunks:
    """Cuts a batch into slices of at most ``chunk`` tokens a device (or a token a row, if that is more), and applies
    functions to one slice at a time, rematerialised: blockwise parallel feed-forward (arXiv 2305.19370).

    Args:
        chunk: tokens of a device in a slice.
        ranks: devices that the sequence is dealt to.
        data_ranks: devices that the rows are dealt to.
    """

    def __init__(self, chunk: int, ranks: int, data_ranks: int) -> None:
        self.chunk, self.ranks, self.data_ranks = chunk, ranks, data_ranks

    def split(self, x: jax.Array) -> jax.Array:
        """``[B,S,...]`` → ``[N, B, ranks, chunk, ...]``: the slices first, each rank's part still on its rank."""
        rows, length = x.shape[:2]
        local = length // self.ranks
        limit = max(1, self.chunk * self.data_ranks // rows)
        size = next(s for s in range(min(limit, local), 0, -1) if local % s == 0)
        return jnp.moveaxis(x.reshape(rows, self.ranks, local // size, size, *x.shape[2:]), 2, 0)

    def map(self, function: Constrain, x: jax.Array) -> jax.Array:
        """``function`` of all slices of ``x``, in x's shape."""
        parts = lax.map(jax.checkpoint(function), self.split(x))
        return jnp.moveaxis(parts, 0, 2).reshape(x.shape)


class Block(nnx.Module):
    """One decoder layer, pre-norm."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config, rngs)

    def __call__(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, attend: Attend, given: Any, mlp_chunks: Chunks | None
    ) -> tuple[jax.Array, Any]:
        mixed, kept = self.self_attn(self.input_layernorm(x), cos, sin, attend, given)
        x = x + mixed

        def feed_forward(part: jax.Array) -> jax.Array:
            return self.mlp(self.post_attention_layernorm(part))

        return x + (feed_forward(x) if mlp_chunks is None else mlp_chunks.map(feed_forward, x)), kept


@dataclass(frozen=True)
class Compute:
    """How the network runs: the dtype it computes in, what its backward pass keeps, and where its arrays lie.

    ``gather_table`` brings the embedding table together for the lookup: looking up rows of a table that is cut by
    columns would make XLA replicate the whole residual stream instead.
    """

    dtype: Any = jnp.float32
    remat: str = "none"
    constrain: Constrain = lambda x: x
    gather_table: Constrain = lambda x: x
    mlp_chunks: Chunks | None = None


class Llama(nnx.Module):
    """The whole network up to the last norm; logits are the loss's and the sampler's to compute, in slices."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        table = jax.random.normal(rngs.params(), (config.vocabulary.size, config.hidden_size), jnp.float32)
        self.embed_tokens = nnx.Param(table * config.init_std)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs)

        self.layers = stack(rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_embeddings:
            head = jax.random.normal(rngs.params(), (config.vocabulary.size, config.hidden_size), jnp.float32)
            self.lm_head = nnx.Param(head * config.init_std)

    @property
    def head(self) -> jax.Array:
        """The output head ``[V, E]``."""
        return self.embed_tokens[...] if self.config.tie_embeddings else self.lm_head[...]

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        rope: RopeTables,
        attend: Attend,
        given: Any = None,
        how: Compute | None = None,
    ) -> tuple[jax.Array, Any]:
        """The residual stream ``[B,S,E]`` after the last norm, and what the layers keep, stacked ``[L, ...]``.

        Args:
            tokens, positions: ``[B,S]`` int32.
            rope: tables that reach beyond the largest position.
            attend: see :data:`Attend`.
            given: a tree of arrays ``[L, ...]``; each layer is given its slice.
            how: precision, rematerialisation, sharding.
        """
        how = how or Compute()
        x = how.constrain(how.gather_table(self.embed_tokens[...].astype(how.dtype))[tokens])
        cos, sin = rope_angles(rope, positions)
        graph, stacked = nnx.split(self.layers)

        def layer(x: jax.Array, of_layer: Any) -> tuple[jax.Array, Any]:
            parameters, layer_given = of_layer
            x, kept = nnx.merge(graph, parameters)(x, cos, sin, attend, layer_given, how.mlp_chunks)
            return how.constrain(x), kept

        if how.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[how.remat], prevent_cse=False)
        x, kept = lax.scan(layer, x, (stacked, given))
        return self.norm(x), kept
