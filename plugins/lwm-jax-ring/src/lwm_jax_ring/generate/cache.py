"""The KV cache of a layer: pages dealt to the ranks of ``sp``, and a tail that all of them have.

What is read in long chunks goes straight into pages, to the ranks that computed it. What comes a few tokens at a time
collects in the tail; a full tail becomes a page of the rank whose turn it is. So a rank holds a part of every row, and
no token that is written needs a transfer but that of its attention's result.

A slot knows no order: all that is cached comes before all that is new. Which slots of a row are in use is kept once for
all layers (:class:`Cache`), since rows differ in length and chunks are rounded up.

The functions here see one device's part, inside ``shard_map``.

Shapes: B rows, K key-value heads, T slots of a rank, N = T / PAGE pages, c new slots, D head dim; n ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from lwm_jax_ring.model.sharding import ROWS

PAGE = 128
"""Slots of a page, and of the tail."""


class Pages(NamedTuple):
    """Keys or values; whole numbers times a scale for each page and head where there are scales."""

    slots: jax.Array  # [B,K,T,D]
    scales: jax.Array | None  # [B,K,N] float32


class LayerCache(NamedTuple):
    """Of one layer."""

    k: Pages
    v: Pages
    tail_k: jax.Array  # [B,K,PAGE,D]
    tail_v: jax.Array  # [B,K,PAGE,D]


class Cache(NamedTuple):
    """Of all layers, and which slots are in use."""

    layers: tuple[LayerCache, ...]
    held: jax.Array  # [B,T] int32: 1 where a slot is in use
    tail_held: jax.Array  # [B,PAGE] int32


HELD, TAIL_HELD, FILL = P(ROWS, "sp"), P(ROWS, None), P("sp")
"""How the slots in use are laid out on the mesh, those of the tail, and the count ``[n]`` of slots that are begun."""


def layer_specs(kind: str) -> LayerCache:
    """How a layer's cache is laid out on the mesh."""
    pages = Pages(P(ROWS, "tp", "sp", None), P(ROWS, "tp", "sp") if kind == "int8" else None)
    tail = P(ROWS, "tp", None, None)
    return LayerCache(pages, pages, tail, tail)


def empty_layer(kind: str, dtype: jnp.dtype, rows: int, kv_heads: int, slots: int, head_dim: int) -> LayerCache:
    """No slot in use. ``kind`` is the trainer's option ``cache``; sizes are those of a device."""
    kept = {"compute": dtype, "bfloat16": jnp.bfloat16, "int8": jnp.int8}[kind]

    def pages() -> Pages:
        scales = jnp.zeros((rows, kv_heads, slots // PAGE), jnp.float32) if kind == "int8" else None
        return Pages(jnp.zeros((rows, kv_heads, slots, head_dim), kept), scales)

    tail = jnp.zeros((rows, kv_heads, PAGE, head_dim), jnp.bfloat16 if kind == "bfloat16" else dtype)
    return LayerCache(pages(), pages(), tail, tail)


def put(pages: Pages, x: jax.Array, at: jax.Array, mine: jax.Array | bool = True) -> Pages:
    """``x [B,K,c,D]`` in the slots from ``at`` on, on a device where it is ``mine``; in place where ``pages`` is given
    away. With scales c and ``at`` are whole pages, and slots that are not in use are 0, so that no scale heeds them."""
    slots, scales = pages
    if scales is not None:
        rows, heads, count, dim = x.shape
        paged = x.astype(jnp.float32).reshape(rows, heads, count // PAGE, PAGE, dim)
        steps = jnp.abs(paged).max(axis=(3, 4)) / 127.0
        codes = jnp.round(paged / jnp.where(steps > 0, steps, 1.0)[..., None, None])
        scales, x = _put(scales, steps, at // PAGE, mine), codes.reshape(x.shape)
    return Pages(_put(slots, x.astype(slots.dtype), at, mine), scales)


def _put(into: jax.Array, x: jax.Array, at: jax.Array, mine: jax.Array | bool) -> jax.Array:
    if mine is not True:
        x = jnp.where(mine, x, lax.dynamic_slice_in_dim(into, at, x.shape[2], axis=2))
    return lax.dynamic_update_slice_in_dim(into, x, at, axis=2)


def part(pages: Pages, at: jax.Array | int, count: int, dtype: jnp.dtype) -> jax.Array:
    """``[B,K,count,D]`` from slot ``at`` on, in ``dtype``; with scales, both are whole pages."""
    slots, scales = pages
    if count < slots.shape[2]:
        slots = lax.dynamic_slice_in_dim(slots, at, count, axis=2)
    if scales is None:
        return slots.astype(dtype)
    if count // PAGE < scales.shape[2]:
        scales = lax.dynamic_slice_in_dim(scales, at // PAGE, count // PAGE, axis=2)
    rows, heads, _, dim = slots.shape
    paged = slots.astype(jnp.float32).reshape(rows, heads, count // PAGE, PAGE, dim)
    return (paged * scales[..., None, None]).reshape(slots.shape).astype(dtype)


def flushed(layer: LayerCache, tail_held: jax.Array, at: jax.Array, mine: jax.Array) -> LayerCache:
    """The tail as a page from slot ``at`` on, of the device where it is ``mine``."""
    used = tail_held[:, None, :, None] > 0
    k, v = (
        put(pages, jnp.where(used, tail, 0), at, mine)
        for pages, tail in ((layer.k, layer.tail_k), (layer.v, layer.tail_v))
    )
    return layer._replace(k=k, v=v)


def grown(layer: LayerCache, slots: int) -> LayerCache:
    """With room for ``slots`` slots on this device."""

    def wider(x: jax.Array, count: int) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, 0), (0, count - x.shape[2]), *[(0, 0)] * (x.ndim - 3)])

    def of(pages: Pages) -> Pages:
        scales = None if pages.scales is None else wider(pages.scales, slots // PAGE)
        return Pages(wider(pages.slots, slots), scales)

    return layer._replace(k=of(layer.k), v=of(layer.v))
