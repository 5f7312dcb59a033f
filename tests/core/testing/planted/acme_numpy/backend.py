"""The ring, rank by rank and hop by hop, with the faults that the kit must find.

Shapes: B batch, S sequence (of a rank: s), H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

import os
import time
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from acme_numpy.options import Options
from lwm_core.attention import AttentionMask, mask_bounds
from lwm_core.errors import ShapeError, UnsupportedError
from lwm_core.layout import SequenceLayout
from lwm_core.protocols import AttentionChoice

Array = NDArray[Any]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Harness:
    """``world`` pretended ranks."""

    def __init__(self, options: Options, world: int) -> None:
        self.fault = options.fault
        self.layout = SequenceLayout(options.layout, world)
        self.random = np.random.default_rng()

    def forward(
        self, q: Array, k: Array, v: Array, mask: AttentionMask, segment_ids: Array | None = None
    ) -> tuple[Array, Array]:
        self._misbehave()
        padded = self._pad(q, k, v, segment_ids)
        ring = Ring(self, *padded[:3], mask, padded[3])
        out, lse = ring.forward()
        out, lse = (self._natural(x)[:, : q.shape[1]] for x in (out, lse))
        if self.fault == "nondeterministic":
            out = out * (1 + 1e-6 * self.random.standard_normal(out.shape).astype(np.float32))
        if self.fault == "lse-log2":
            lse = lse / np.float32(np.log(2))
        if self.fault == "lse-zero-on-empty":
            lse = np.where(np.isneginf(lse), np.float32(0), lse)
        return out.astype(q.dtype), lse

    def backward(
        self, q: Array, k: Array, v: Array, mask: AttentionMask, dout: Array, segment_ids: Array | None = None
    ) -> tuple[Array, ...]:
        padded = self._pad(q, k, v, segment_ids, dout)
        ring = Ring(self, *padded[:3], mask, padded[3])
        return tuple(self._natural(x)[:, : q.shape[1]].astype(q.dtype) for x in ring.backward(padded[4]))

    def close(self) -> None:
        pass

    def _natural(self, x: Array) -> Array:
        size = x.shape[1]
        order = self.layout.permutation(size) if self.fault == "wrong-inverse" else self.layout.inverse(size)
        return x[:, order]

    def _pad(self, q: Array, k: Array, v: Array, ids: Array | None, *more: Array) -> list[Any]:
        for x in (q, k, v):
            if x.dtype not in (np.float32, BFLOAT16):
                raise UnsupportedError(f"acme-numpy: {x.dtype} is not supported; use float32 or bfloat16")
        if q.shape[2] % k.shape[2] and self.fault != "floors-groups":
            raise ShapeError(f"acme-numpy: {q.shape[2]} heads over {k.shape[2]} key-value heads")
        missing = -q.shape[1] % self.layout.multiple
        if self.fault != "pads-silently":
            self.layout.check(q.shape[1])
        elif missing:
            ids = np.ones(q.shape[:2], np.int32) if ids is None else ids
            pad = lambda x: np.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))  # noqa: E731
            return [pad(q), pad(k), pad(v), pad(ids), *map(pad, more)]
        return [q, k, v, ids, *more]

    def _misbehave(self) -> None:
        if self.fault == "raises":
            raise RuntimeError("the kernel\nis out of order")
        if self.fault == "dies":
            print("last words", flush=True)
            os._exit(3)
        if self.fault == "hangs":
            time.sleep(60)


class Ring:
    """One call: arrays in the layout's order, float32 inside."""

    def __init__(self, harness: Harness, q: Array, k: Array, v: Array, mask: AttentionMask, ids: Array | None) -> None:
        self.fault, self.world = harness.fault, harness.layout.world
        size, heads = q.shape[1], q.shape[2]
        order = harness.layout.permutation(size)
        self.kv_heads = k.shape[2]
        self.groups = -(-heads // self.kv_heads)
        spread = (lambda x: np.tile(x, (1, 1, self.groups, 1))) if self.fault == "tiled-heads" else (
            lambda x: np.repeat(x, self.groups, axis=2)[:, :, :heads]
        )  # fmt: skip
        self.order = order
        self.q = q.astype(np.float32)[:, order]
        self.k, self.v = (spread(x.astype(np.float32))[:, order] for x in (k, v))
        self.scale = np.float32(q.shape[-1] ** -0.5)
        seen_ids = None if self.fault == "ignores-segments" else ids
        low, high = (np.broadcast_to(b, q.shape[:2])[:, order] for b in mask_bounds(mask, size, seen_ids))
        self.low, self.high = low, high + (self.fault == "off-by-one")
        self.ids = np.ones(q.shape[:2], np.int32) if seen_ids is None else seen_ids[:, order]
        self.round = (lambda x: x.astype(BFLOAT16).astype(np.float32)) if (
            self.fault == "bf16-accumulators" and q.dtype == BFLOAT16 and self.world > 1
        ) else (lambda x: x)  # fmt: skip

    def hops(self) -> Any:
        """(the queries' slots, the keys' slots) of every hop of every rank."""
        size = len(self.order) // self.world
        for rank in range(self.world):
            for hop in range(self.world - (self.fault == "forgets-last-hop" and self.world > 1)):
                source = (rank - hop) % self.world
                yield slice(rank * size, (rank + 1) * size), slice(source * size, (source + 1) * size)

    def scores(self, a: slice, b: slice) -> Array:
        """Masked logits ``[B,H,s,s]``."""
        index = self.order[b]
        seen = (self.low[:, a, None] <= index) & (index <= self.high[:, a, None])
        seen &= (self.ids[:, a, None] == self.ids[:, None, b]) & (self.ids[:, a, None] != 0)
        scores = np.einsum("bqhd,bkhd->bhqk", self.q[:, a], self.k[:, b]) * self.scale
        return np.where(seen[:, None], scores, np.float32(-np.inf))

    def forward(self) -> tuple[Array, Array]:
        out, lse = np.zeros_like(self.q), np.full(self.q.shape[:3], -np.inf, np.float32)
        for a, b in self.hops():
            scores = self.scores(a, b)
            top = np.zeros_like(scores[..., :1]) if self.fault == "overflows" else scores.max(-1, keepdims=True)
            top = np.where(np.isneginf(top), np.float32(0), top)
            with np.errstate(all="ignore"):
                weights = np.exp(scores - top)
                total = weights.sum(-1, keepdims=True)
                block_lse = (np.log(total) + top)[..., 0].transpose(0, 2, 1)
                block = np.einsum("bhqk,bkhd->bqhd", weights / np.where(total > 0, total, 1), self.v[:, b])
                merged = np.logaddexp(lse[:, a], block_lse)
                weight = [np.where(np.isneginf(x), 0, np.exp(x - merged))[..., None] for x in (lse[:, a], block_lse)]
            out[:, a] = self.round(out[:, a] * weight[0] + block * weight[1])
            lse[:, a] = merged
        return out, lse

    def backward(self, dout: Array) -> tuple[Array, Array, Array]:
        out, lse = self.forward()
        dout = dout.astype(np.float32)[:, self.order]
        delta = (dout * out).sum(-1).transpose(0, 2, 1)[..., None]
        finite = np.where(np.isneginf(lse), np.float32(0), lse).transpose(0, 2, 1)[..., None]
        dq, dk, dv = np.zeros_like(self.q), np.zeros_like(self.k), np.zeros_like(self.v)
        for a, b in self.hops():
            with np.errstate(all="ignore"):
                p = np.exp(self.scores(a, b) - finite[:, :, a])
            dp = np.einsum("bqhd,bkhd->bhqk", dout[:, a], self.v[:, b])
            ds = p * (dp - delta[:, :, a]) * self.scale
            dq[:, a] = self.round(dq[:, a] + np.einsum("bhqk,bkhd->bqhd", ds, self.k[:, b]))
            dk[:, b] = self.round(dk[:, b] + np.einsum("bhqk,bqhd->bkhd", ds, self.q[:, a]))
            dv[:, b] = self.round(dv[:, b] + np.einsum("bhqk,bqhd->bkhd", p, dout[:, a]))
        return dq, self.gathered(dk), self.gathered(dv)

    def gathered(self, x: Array) -> Array:
        """Gradients of the key-value heads from those of the query heads."""
        b, s, h, d = x.shape
        x = np.pad(x, ((0, 0), (0, 0), (0, self.kv_heads * self.groups - h), (0, 0)))
        if self.fault == "tiled-heads":
            return x.reshape(b, s, self.groups, self.kv_heads, d).sum(2)
        return x.reshape(b, s, self.kv_heads, self.groups, d).sum(3)


class Factory:
    """The factory object of the plugin."""

    def resolve(self, options: Any, shape: Any, mesh: Any, axes: Any) -> AttentionChoice:
        return AttentionChoice(options)

    def layout(self, options: Options, seq_len: int, world: int) -> SequenceLayout:
        layout = SequenceLayout(options.layout, world)
        layout.check(seq_len)
        return layout

    def build(self, options: Options, mesh: Any, axes: Any, seq_len: int) -> Any:
        raise UnsupportedError("acme-numpy: it runs in the kit's harness alone")

    def harness(self, options: Options, world: int) -> Harness:
        return Harness(options, world)


factory = Factory()
