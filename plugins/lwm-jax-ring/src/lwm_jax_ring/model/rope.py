"""Rotary embedding in float32, exact to a float32 ulp at any position.

A float32 angle of a million radians is off by up to 0.03. So a position is split into ``1024·high + low``, the cosines
and sines of both parts come from two small tables made in float64, and the angle addition theorem joins them.

Shapes: B batch, S sequence, N heads, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lwm_core.rope import RopeSpec

LOW = 1024


class RopeTables(NamedTuple):
    """Cosines and sines of both parts of a position, float32 ``[LOW or more positions / LOW, D/2]``.

    A program takes them as arguments: one compiled for a length then serves every theta and scaling.
    """

    cos_low: jax.Array
    sin_low: jax.Array
    cos_high: jax.Array
    sin_high: jax.Array


def rope_tables(rope: RopeSpec, head_dim: int, max_position: int) -> RopeTables:
    """The tables for positions in ``[0, max_position)``, the attention factor included."""
    frequencies = rope.inverse_frequencies(head_dim)
    low = np.arange(LOW)[:, None] * frequencies
    high = np.arange(-(-max_position // LOW))[:, None] * (LOW * frequencies)
    factor = rope.attention_factor
    tables = (np.cos(low), np.sin(low), np.cos(high) * factor, np.sin(high) * factor)
    return RopeTables(*(np.asarray(table, np.float32) for table in tables))


def rope_angles(tables: RopeTables, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin ``[B,S,D/2]`` float32 for ``positions [B,S]`` int32, times the attention factor."""
    at_low, at_high = positions % LOW, positions // LOW
    cl, sl, ch, sh = (
        jnp.asarray(table)[at] for table, at in zip(tables, (at_low, at_low, at_high, at_high), strict=True)
    )
    return ch * cl - sh * sl, sh * cl + ch * sl


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the halves of each head of ``x [...,N,D]`` by angles ``[...,D/2]``: in float32, back in x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    c, s = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([first * c - second * s, second * c + first * s], axis=-1).astype(x.dtype)
