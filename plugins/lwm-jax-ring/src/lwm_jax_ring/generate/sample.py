"""Drawing a token from logits.

Shapes: B rows, P pairs of rows, V ids.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from lwm_core.protocols import SamplingSpec


def guide(logits: jax.Array, scale: float) -> jax.Array:
    """``u + scale·(c − u)``, classifier-free guidance (arXiv 2207.12598), of pairs c, u of rows.

    At 1 and 0 it is one of them to the bit, not to a rounding of the other.

    Args:
        logits: ``[2P,V]``, conditional and unconditional in turn.

    Returns:
        ``[P,V]``.
    """
    pairs = logits.reshape(-1, 2, logits.shape[-1])
    conditional, unconditional = pairs[:, 0], pairs[:, 1]
    if scale == 1.0:
        return conditional
    return unconditional if scale == 0.0 else unconditional + scale * (conditional - unconditional)


def sample(logits: jax.Array, key: jax.Array, sampling: SamplingSpec) -> jax.Array:
    """Draw one id a row from ``logits [B,V]`` float32: greedy at temperature 0, else within top-k, top-p and min-p.

    Top-k comes first; top-p then keeps the smallest set of likeliest ids whose probability, at the given temperature,
    reaches it (arXiv 1904.09751); min-p those at least so many times as probable as the likeliest (arXiv 2407.01082),
    which is always kept.

    Returns:
        ``[B]`` int32.
    """
    if sampling.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1.0:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = (before < sampling.top_p).sum(axis=-1, keepdims=True)
        least = jnp.take_along_axis(ordered, kept - 1, axis=-1)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.min_p > 0.0:
        least = logits.max(axis=-1, keepdims=True) + math.log(sampling.min_p)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
