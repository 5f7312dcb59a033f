"""The oracle: attention forward, lse and backward, and a whole tiny Llama, in float64 NumPy.

Written for plainness, not speed; the S×S arrays here are the point. Everything is in natural order.

Shapes: B batch, S sequence (queries Sq, keys Sk), H query heads, K key-value heads, D head dim, E hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lwm_core.attention import AttentionMask, mask_bounds
from lwm_core.batch import PackedBatch
from lwm_core.model import ModelConfig
from lwm_core.rope import RopeSpec

Float64 = NDArray[np.float64]


def visible(mask: AttentionMask, seq_len: int, segment_ids: NDArray[np.integer] | None = None) -> NDArray[np.bool_]:
    """``[B or 1, Sq, Sk]`` bool: whether query q sees key k."""
    low, high = mask_bounds(mask, seq_len, segment_ids)
    index = np.arange(seq_len)
    seen = (low[..., None] <= index) & (index <= high[..., None])
    seen = seen.reshape(-1, seq_len, seq_len)
    if segment_ids is None:
        return seen
    ids = np.asarray(segment_ids)
    same = (ids[:, :, None] == ids[:, None, :]) & (ids[:, :, None] != 0)
    result: NDArray[np.bool_] = seen & same
    return result


def _scores(q: Float64, k: Float64, scale: float, softcap: float | None) -> Float64:
    """``[B, H, Sq, Sk]``, bent into ±softcap where there is one."""
    scores: Float64 = np.einsum("bqhd,bkhd->bhqk", q, k) * scale
    return scores if softcap is None else softcap * np.tanh(scores / softcap)


def _probabilities(scores: Float64, seen: NDArray[np.bool_]) -> tuple[Float64, Float64]:
    """Softmax weights ``[B, H, Sq, Sk]`` and lse ``[B, H, Sq]``; rows that see nothing have weights 0 and lse −inf."""
    scores = np.where(seen[:, None], scores, -np.inf)
    top = scores.max(axis=-1)
    top_finite = np.where(np.isfinite(top), top, 0.0)
    exponentials = np.exp(scores - top_finite[..., None])
    total = exponentials.sum(axis=-1)
    with np.errstate(divide="ignore"):
        lse = np.log(total) + top_finite
    return exponentials / np.where(total > 0, total, 1.0)[..., None], lse


def _wide(*arrays: ArrayLike) -> list[Float64]:
    return [np.asarray(array).astype(np.float64) for array in arrays]


def attention_forward(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    mask: AttentionMask,
    segment_ids: NDArray[np.integer] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Float64, Float64]:
    """Softmax attention of ``q [B,S,H,D]`` over ``k, v [B,S,K,D]``; ``1/sqrt(D)`` is the default scale.

    Returns:
        out ``[B,S,H,D]`` and lse ``[B,S,H]``, float64; 0 and −inf where a query sees nothing.
    """
    q64, k64, v64 = _wide(q, k, v)
    groups = q64.shape[2] // k64.shape[2]
    k64, v64 = np.repeat(k64, groups, axis=2), np.repeat(v64, groups, axis=2)
    seen = visible(mask, q64.shape[1], segment_ids)
    factor = scale if scale is not None else q64.shape[-1] ** -0.5
    p, lse = _probabilities(_scores(q64, k64, factor, softcap), seen)
    return np.einsum("bhqk,bkhd->bqhd", p, v64), lse.transpose(0, 2, 1)


def attention_backward(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    mask: AttentionMask,
    dout: ArrayLike,
    segment_ids: NDArray[np.integer] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Float64, Float64, Float64]:
    """Gradients of ``sum(out · dout)`` with respect to q, k and v, in their shapes, float64."""
    q64, k64, v64, do64 = _wide(q, k, v, dout)
    batch, length, kv_heads, dim = k64.shape
    groups = q64.shape[2] // kv_heads
    k_all, v_all = np.repeat(k64, groups, axis=2), np.repeat(v64, groups, axis=2)
    factor = scale if scale is not None else dim**-0.5
    scores = _scores(q64, k_all, factor, softcap)
    p, _ = _probabilities(scores, visible(mask, length, segment_ids))
    dp = np.einsum("bqhd,bkhd->bhqk", do64, v_all)
    slope = 1.0 if softcap is None else 1.0 - (scores / softcap) ** 2
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) * slope * factor
    dq = np.einsum("bhqk,bkhd->bqhd", ds, k_all)
    dk = np.einsum("bhqk,bqhd->bkhd", ds, q64).reshape(batch, length, kv_heads, groups, dim).sum(axis=3)
    dv = np.einsum("bhqk,bqhd->bkhd", p, do64).reshape(batch, length, kv_heads, groups, dim).sum(axis=3)
    return dq, dk, dv


def _rms_norm(x: Float64, weight: Float64, eps: float) -> Float64:
    normed: Float64 = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight
    return normed


def _rotate(x: Float64, cos: Float64, sin: Float64) -> Float64:
    """Rotate the two halves of each head: ``x [B,S,H,D]``, tables ``[B,S,D/2]``."""
    first, second = np.split(x, 2, axis=-1)
    c, s = cos[:, :, None], sin[:, :, None]
    return np.concatenate([first * c - second * s, second * c + first * s], axis=-1)


def llama_logits(
    parameters: Mapping[str, ArrayLike], config: ModelConfig, rope: RopeSpec, batch: PackedBatch
) -> Float64:
    """Logits ``[B, S, V]`` of a whole Llama with canonical ``parameters``, causal inside documents."""
    p = {name: np.asarray(value).astype(np.float64) for name, value in parameters.items()}
    cos, sin = rope.tables(batch.positions, config.head_dim)
    x = p["model.embed_tokens.weight"][batch.tokens]
    rows, length = batch.shape
    for i in range(config.num_layers):
        layer = {name.split(f"layers.{i}.")[1]: w for name, w in p.items() if f"layers.{i}." in name}
        h = _rms_norm(x, layer["input_layernorm.weight"], config.rms_norm_eps)
        heads = []
        for name, count in (("q", config.num_heads), ("k", config.num_kv_heads), ("v", config.num_kv_heads)):
            y = h @ layer[f"self_attn.{name}_proj.weight"].T + layer.get(f"self_attn.{name}_proj.bias", 0.0)
            heads.append(y.reshape(rows, length, count, config.head_dim))
        q, k, v = _rotate(heads[0], cos, sin), _rotate(heads[1], cos, sin), heads[2]
        out, _ = attention_forward(q, k, v, AttentionMask("causal"), batch.segment_ids)
        x = x + out.reshape(rows, length, -1) @ layer["self_attn.o_proj.weight"].T
        h = _rms_norm(x, layer["post_attention_layernorm.weight"], config.rms_norm_eps)
        gate = h @ layer["mlp.gate_proj.weight"].T
        up = h @ layer["mlp.up_proj.weight"].T
        x = x + (gate / (1.0 + np.exp(-gate)) * up) @ layer["mlp.down_proj.weight"].T
    x = _rms_norm(x, p["model.norm.weight"], config.rms_norm_eps)
    head = p["model.embed_tokens.weight"] if config.tie_embeddings else p["lm_head.weight"]
    logits: Float64 = x @ head.T
    return logits


def modality_loss(
    logits: Float64, config: ModelConfig, batch: PackedBatch, alphas: Mapping[str, float]
) -> tuple[float, dict[str, float]]:
    """``Σ_m α_m · Σ w·ce / Σ w`` over the targets of each modality m, softmax over m's slice of the vocabulary.

    Returns:
        the loss, and each modality's mean cross-entropy in nats (0 for one that is absent).
    """
    means: dict[str, float] = {}
    for name, ids in config.vocabulary.slices.items():
        mine = (batch.targets >= ids.start) & (batch.targets < ids.stop)
        weights = np.where(mine, batch.loss_weights, 0.0).astype(np.float64)
        part = logits[..., ids]
        top = part.max(axis=-1)
        lse = np.log(np.exp(part - top[..., None]).sum(axis=-1)) + top
        local = np.clip(batch.targets - ids.start, 0, ids.stop - ids.start - 1)
        ce = lse - np.take_along_axis(part, local[..., None].astype(np.int64), axis=-1)[..., 0]
        total = weights.sum()
        means[name] = float((weights * ce).sum() / total) if total > 0 else 0.0
    return sum(alphas.get(name, 1.0) * mean for name, mean in means.items()), means
