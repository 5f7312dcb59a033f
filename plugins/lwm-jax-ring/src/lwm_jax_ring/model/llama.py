"""A decoder-only Llama in flax nnx, its layers stacked and scanned.

Computation is in ``compute_dtype``; parameters, RMSNorm, RoPE and softmax statistics are float32. Linear kernels are
``[in, out]`` here and ``[out, in]`` under their canonical names (``names.py``).

Shapes: B batch, S sequence, E hidden size, F feed-forward size, H query heads, K key-value heads, D head dim,
L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lwm_core.model import ModelConfig
from lwm_jax_ring.attention.differentiable import LSE_NAME, OUT_NAME
from lwm_jax_ring.model.rope import RopeTables, rope_angles, rotate

Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
"""q ``[B,S,H,D]``, k and v ``[B,S,K,D]``, what the layer was given → out ``[B,S,H,D]``, what the layer keeps.

Training is given nothing and keeps nothing; prefill keeps k and v; decoding is given a layer's cache."""

Constrain = Callable[[jax.Array], jax.Array]
"""Pins the sharding of the residual stream ``[B,S,E]``."""

STREAM_NAME = "layer_input"
"""Name of what goes into a layer, for policies that keep it elsewhere."""

REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(OUT_NAME, LSE_NAME),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[LSE_NAME],
        names_which_can_be_offloaded=[STREAM_NAME, OUT_NAME],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What a layer keeps for its backward pass. ``attention`` keeps out and lse, so that the ring never runs twice;
``offload`` too, but out and the layer's input in the host's memory."""


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root mean square norm over the last axis (arXiv 1910.07467), in float32, back in x's dtype."""
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * weight).astype(x.dtype)


class RMSNorm(nnx.Module):
    """See :func:`rms_norm`."""

    def __init__(self, size: int, eps: float) -> None:
        self.weight = nnx.Param(jnp.ones((size,), jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.weight[...], self.eps)


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``x [...,in] @ kernel [in,out]`` in x's dtype; the gradient of the float32 kernel is summed in float32.

    Left to itself the sum over tokens, slices and devices would be made in x's dtype and cast only then.
    """
    return x @ kernel.astype(x.dtype)


def _product_rule(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(x, kernel), (x, kernel)


def _product_gradients(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    over = tuple(range(x.ndim - 1))
    dkernel = lax.dot_general(x, dy, ((over, over), ((), ())), preferred_element_type=jnp.float32)
    return dy @ kernel.astype(x.dtype).T, dkernel


product.defvjp(_product_rule, _product_gradients)


class Linear(nnx.Module):
    """``x @ kernel (+ bias)`` in x's dtype; the kernel ``[in, out]`` is drawn from N(0, std²)."""

    def __init__(self, rows: int, columns: int, std: float, rngs: nnx.Rngs, bias: bool = False) -> None:
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (rows, columns), jnp.float32) * std)
        self.bias = nnx.Param(jnp.zeros((columns,), jnp.float32)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = product(x, self.kernel[...])
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

    def project(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q ``[...,H,D]``, k and v ``[...,K,D]`` of ``x [...,E]``, q and k rotated."""
        q, k, v = (p(x).reshape(*x.shape[:-1], -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def mix(self, out: jax.Array) -> jax.Array:
        """``[...,H,D]`` → ``[...,E]``."""
        return self.o_proj(out.reshape(*out.shape[:-2], -1))


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
    functions to one slice at a time, rematerialised (blockwise parallel transformer, arXiv 2305.19370).

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

    def map(self, function: Callable[..., Any], *arrays: jax.Array) -> Any:
        """``function`` of all slices of the ``arrays [B,S,...]``; what it gives has their order of tokens too."""
        rows, length = arrays[0].shape[:2]
        parts = lax.map(lambda part: jax.checkpoint(function)(*part), tuple(self.split(x) for x in arrays))

        def joined(part: jax.Array) -> jax.Array:
            return jnp.moveaxis(part, 0, 2).reshape(rows, length, *part.shape[4:])

        return jax.tree.map(joined, parts)


def _at_once(function: Callable[..., Any], *arrays: jax.Array) -> Any:
    return function(*arrays)


class Block(nnx.Module):
    """One decoder layer, pre-norm: what comes before attention and what comes after it, each token for itself."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config, rngs)

    def __call__(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, attend: Attend, given: Any, how: Compute
    ) -> tuple[jax.Array, Any]:
        over_tokens = _at_once if how.chunks is None else how.chunks.map
        out, kept = attend(*over_tokens(partial(self.before, how), x, cos, sin), given)
        return over_tokens(partial(self.after, how), x, out), kept

    def before(self, how: Compute, x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, ...]:
        """q, k and v of the stream ``x [...,E]``."""
        return self.self_attn.project(how.constrain(self.input_layernorm(x)), cos, sin)

    def after(self, how: Compute, x: jax.Array, out: jax.Array) -> jax.Array:
        """The stream with what attention gave, ``[...,H,D]``, and the feed-forward added."""
        x = how.constrain(x + self.self_attn.mix(out))
        return how.constrain(x + self.mlp(how.constrain(self.post_attention_layernorm(x))))


@dataclass(frozen=True)
class Compute:
    """How the network runs: the dtype it computes in, what its backward pass keeps, and where its arrays lie.

    ``gather_layer`` brings the parameters of a layer together (:func:`lwm_jax_ring.model.sharding.gathered`).
    ``gather_table`` brings the rows of the embedding table together for the lookup, cut by columns as the stream is:
    of a table that is cut in any other way XLA looks up whole rows for all tokens first.
    """

    dtype: Any = jnp.float32
    remat: str = "none"
    constrain: Constrain = lambda x: x
    gather_table: Constrain = lambda x: x
    gather_layer: Callable[[Any], Any] = lambda parameters: parameters
    chunks: Chunks | None = None


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
        # Cast after the lookup, so that the rows' gradients are summed in float32.
        x = how.constrain(how.gather_table(self.embed_tokens[...])[tokens].astype(how.dtype))
        cos, sin = rope_angles(rope, positions)
        graph, stacked = nnx.split(self.layers)

        def layer(x: jax.Array, of_layer: Any) -> tuple[jax.Array, Any]:
            parameters, layer_given = of_layer
            x = checkpoint_name(x, STREAM_NAME)
            nnx.replace_by_pure_dict(parameters, how.gather_layer(nnx.to_pure_dict(parameters)))
            x, kept = nnx.merge(graph, parameters)(x, cos, sin, attend, layer_given, how)
            return x, kept

        if how.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[how.remat], prevent_cse=False)
        x, kept = lax.scan(layer, x, (stacked, given))
        return self.norm(x), kept
