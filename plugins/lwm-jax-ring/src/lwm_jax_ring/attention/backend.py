"""The attention backend ``jax-ring``: binds a strategy to the trainer's mesh, and a harness for the conformance kit.

Shapes: B batch, S sequence, H query heads, K key-value heads, D head dim; global arrays, tokens in the layout's order.
"""

from __future__ import annotations

from math import lcm
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray

from lwm_core.attention import AttentionMask
from lwm_core.errors import ShapeError, UnsupportedError
from lwm_core.layout import SequenceLayout
from lwm_core.protocols import AttentionAxes
from lwm_jax_ring.attention.options import AttentionOptions
from lwm_jax_ring.attention.ring import RingSpec, ring_attention, ring_forward

DTYPES = ("float32", "bfloat16")


def _check(q: Any, k: Any, v: Any, segment_ids: Any | None, seq_len: int) -> None:
    """Refuse shapes and dtypes that do not fit together, in words."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ShapeError(
            f"jax-ring: q {q.shape}, k {k.shape}, v {v.shape} do not fit; expected q [B,S,H,D] and k, v [B,S,K,D]"
        )
    if q.shape[2] % k.shape[2]:
        raise ShapeError(f"jax-ring: {q.shape[2]} query heads are not a multiple of {k.shape[2]} key-value heads")
    if q.shape[1] != seq_len:
        raise ShapeError(f"jax-ring: built for sequences of {seq_len} tokens, got {q.shape[1]}")
    if segment_ids is not None and segment_ids.shape != q.shape[:2]:
        raise ShapeError(f"jax-ring: segment_ids {segment_ids.shape} must be [B,S] = {q.shape[:2]}")
    for name, array in (("q", q), ("k", k), ("v", v)):
        if str(array.dtype) not in DTYPES:
            raise UnsupportedError(f"jax-ring: {name} is {array.dtype}; supported are {' and '.join(DTYPES)}")


class JaxRing:
    """Attention over the ``sp`` axis of ``mesh`` for sequences of ``seq_len`` tokens."""

    def __init__(self, options: AttentionOptions, mesh: Mesh, axes: AttentionAxes, seq_len: int) -> None:
        self.options, self.mesh, self.axes, self.seq_len = options, mesh, axes, seq_len
        self.layout = SequenceLayout(options.layout, mesh.shape[axes.seq])
        self.layout.check(seq_len)

    def spec(self, mask: AttentionMask, head_dim: int) -> RingSpec:
        """The ring for one mask and head dim; the softmax scale is ``1/sqrt(D)``."""
        return RingSpec(
            axis=self.axes.seq,
            layout=self.layout,
            seq_len=self.seq_len,
            mask=mask,
            scale=head_dim**-0.5,
            query_chunk=self.options.query_chunk,
            key_chunk=self.options.key_chunk,
        )

    def _fit_heads(self, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Repeat key-value heads where there are fewer than ``tp`` ranks, so that each rank holds its own."""
        ranks, kv_heads = self.mesh.shape[self.axes.heads], k.shape[2]
        if q.shape[2] % ranks:
            raise ShapeError(f"jax-ring: {q.shape[2]} query heads do not divide over tp = {ranks}")
        if kv_heads % ranks == 0:
            return k, v
        repeats = lcm(kv_heads, ranks) // kv_heads
        if (q.shape[2] // kv_heads) % repeats:
            raise UnsupportedError(
                f"jax-ring: {kv_heads} key-value heads of {q.shape[2]} cannot be dealt to tp = {ranks}; "
                "use a tp that the key-value heads divide or are divided by"
            )
        return jnp.repeat(k, repeats, axis=2), jnp.repeat(v, repeats, axis=2)

    def _specs(self) -> tuple[P, P]:
        batch, heads, seq = self.axes.batch, self.axes.heads, self.axes.seq
        return P(batch, seq, heads, None), P(batch, seq)

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """Differentiable attention; global arrays inside jit, tokens in the layout's order.

        Args:
            q: ``[B,S,H,D]``; k, v: ``[B,S,K,D]``, float32 or bfloat16.
            mask: which keys a query may see.
            segment_ids: ``[B,S]`` int32, documents from 1; 0 sees nothing. None: one document a row.

        Returns:
            ``[B,S,H,D]`` in q's dtype; 0 where a query sees nothing.

        Raises:
            ShapeError: shapes do not fit, or the heads do not divide over ``tp``.
            UnsupportedError: a dtype other than float32 and bfloat16.
        """
        _check(q, k, v, segment_ids, self.seq_len)
        k, v = self._fit_heads(q, k, v)
        spec, (heads, tokens) = self.spec(mask, q.shape[-1]), self._specs()
        if segment_ids is None:
            run = jax.shard_map(
                lambda a, b, c: ring_attention(a, b, c, None, spec),
                mesh=self.mesh, in_specs=(heads,) * 3, out_specs=heads, check_vma=False,
            )  # fmt: skip
            return run(q, k, v)
        run = jax.shard_map(
            lambda a, b, c, s: ring_attention(a, b, c, s, spec),
            mesh=self.mesh, in_specs=(heads, heads, heads, tokens), out_specs=heads, check_vma=False,
        )  # fmt: skip
        return run(q, k, v, segment_ids)


class JaxRingHarness:
    """``world`` devices of this process as one ring; NumPy in and out, natural order."""

    def __init__(self, options: AttentionOptions, world: int) -> None:
        devices = jax.devices()
        if len(devices) < world:
            raise ShapeError(f"jax-ring: world {world} needs {world} devices, but {len(devices)} are here")
        self.options = options
        self.mesh = Mesh(np.array(devices[:world]).reshape(1, 1, 1, world), ("dp", "fsdp", "tp", "sp"))
        self._compiled: dict[Any, Any] = {}

    def _run(self, kind: str, mask: AttentionMask, arrays: dict[str, Any], segments: Any | None) -> Any:
        backend = JaxRing(self.options, self.mesh, AttentionAxes(), arrays["q"].shape[1])
        _check(arrays["q"], arrays["k"], arrays["v"], segments, backend.seq_len)
        key = (kind, mask, segments is None, *((name, a.shape, str(a.dtype)) for name, a in arrays.items()))
        if key not in self._compiled:
            self._compiled[key] = self._build(kind, backend, mask, arrays["q"].shape[-1], segments is None)
        order = backend.layout.permutation(backend.seq_len)
        inverse = backend.layout.inverse(backend.seq_len)
        given = [jnp.asarray(array[:, order]) for array in arrays.values()]
        if segments is not None:
            given.append(jnp.asarray(segments, jnp.int32)[:, order])
        return tuple(np.asarray(result)[:, inverse] for result in self._compiled[key](*given))

    def _build(self, kind: str, backend: JaxRing, mask: AttentionMask, head_dim: int, plain: bool) -> Any:
        spec = backend.spec(mask, head_dim)
        if kind == "forward":

            def local(q, k, v, segments=None):  # type: ignore[no-untyped-def]
                return ring_forward(q, k, v, segments, spec)
        else:

            def local(q, k, v, dout, segments=None):  # type: ignore[no-untyped-def]
                _, pullback = jax.vjp(lambda a, b, c: ring_attention(a, b, c, segments, spec), q, k, v)
                return pullback(dout)
        count = 3 if kind == "forward" else 4
        in_specs = (P(None, "sp"),) * (count if plain else count + 1)
        return jax.jit(
            jax.shard_map(local, mesh=self.mesh, in_specs=in_specs, out_specs=P(None, "sp"), check_vma=False)
        )

    def forward(
        self,
        q: NDArray[Any],
        k: NDArray[Any],
        v: NDArray[Any],
        mask: AttentionMask,
        segment_ids: NDArray[np.integer] | None = None,
    ) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """See ``lwm_core.protocols.AttentionHarness``."""
        out, lse = self._run("forward", mask, {"q": q, "k": k, "v": v}, segment_ids)
        return out, lse

    def backward(
        self,
        q: NDArray[Any],
        k: NDArray[Any],
        v: NDArray[Any],
        mask: AttentionMask,
        dout: NDArray[Any],
        segment_ids: NDArray[np.integer] | None = None,
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """See ``lwm_core.protocols.AttentionHarness``."""
        dq, dk, dv = self._run("backward", mask, {"q": q, "k": k, "v": v, "dout": dout}, segment_ids)
        return dq, dk, dv

    def close(self) -> None:
        """Drop the compiled programs."""
        self._compiled.clear()


class JaxRingFactory:
    """The factory object of the plugin."""

    def layout(self, options: AttentionOptions, seq_len: int, world: int) -> SequenceLayout:
        """The layout over ``world`` ranks; raises ShapeError for a length that does not divide."""
        layout = SequenceLayout(options.layout, world)
        layout.check(seq_len)
        return layout

    def build(self, options: AttentionOptions, mesh: Mesh, axes: AttentionAxes, seq_len: int) -> JaxRing:
        """The backend on the trainer's mesh."""
        return JaxRing(options, mesh, axes, seq_len)

    def harness(self, options: AttentionOptions, world: int) -> JaxRingHarness:
        """``world`` host devices where the machine has no accelerators enough; call it before JAX has started."""
        from lwm_jax_ring.devices import ensure_devices

        ensure_devices(world)
        return JaxRingHarness(options, world)


factory = JaxRingFactory()
