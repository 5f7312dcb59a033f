"""Rotary embedding in float32, exact to a float32 ulp at any position.

A float32 angle of a million radians is off by up to 0.03. So a position is split into ``1024·high + low``, the cosines
and sines of both parts come from two small tables made in float64, and the angle addition theorem joins them.

Shapes: B batch, S sequence, N heads, D head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lwm_core.rope import RopeSpec

LOW = 1024


def rope_tables(rope: RopeSpec, positions: jax.Array, head_dim: int, max_position: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin ``[B,S,D/2]`` float32 for ``positions [B,S]`` int32 in ``[0, max_position)``."""
    frequencies = rope.inverse_frequencies(head_dim)
    low = np.arange(LOW)[:, None] * frequencies
    high = np.arange(-(-max_position // LOW))[:, None] * (LOW * frequencies)
    cos_l, sin_l, cos_h, sin_h = (
        jnp.asarray(table, jnp.float32) for table in (np.cos(low), np.sin(low), np.cos(high), np.sin(high))
    )
    at_low, at_high = positions % LOW, positions // LOW
    cl, sl, ch, sh = cos_l[at_low], sin_l[at_low], cos_h[at_high], sin_h[at_high]
    factor = jnp.float32(rope.attention_factor)
    return (ch * cl - sh * sl) * factor, (sh * cl + ch * sl) * factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the two halves of each head of ``x [B,S,N,D]``; computed in float32, given back in x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    c, s = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * c - second * s, second * c + first * s], axis=-1).astype(x.dtype)
