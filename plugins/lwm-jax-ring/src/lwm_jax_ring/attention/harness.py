"""The conformance kit's way in: a strategy on devices of this process, NumPy in and out.

Shapes: B batch, S sequence, H query heads, K key-value heads, D head dim; natural order.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray

from lwm_core.attention import AttentionMask
from lwm_core.errors import ShapeError
from lwm_jax_ring.attention.options import AttentionOptions
from lwm_jax_ring.attention.spec import AttentionSpec
from lwm_jax_ring.attention.strategies import STRATEGIES, attention_spec, check_arrays, sequence_layout


class JaxRingHarness:
    """``world`` devices of this process as one mesh axis; NumPy in and out, natural order."""

    def __init__(self, options: AttentionOptions, world: int) -> None:
        devices = jax.devices()
        if len(devices) < world:
            raise ShapeError(f"jax-ring: world {world} needs {world} devices, but {len(devices)} are here")
        self.options = options
        self.mesh = Mesh(np.array(devices[:world]), ("sp",))
        self._compiled: dict[Any, Any] = {}

    def _run(self, kind: str, mask: AttentionMask, arrays: dict[str, Any], segments: Any | None) -> Any:
        world, (seq_len, _, head_dim) = self.mesh.size, arrays["q"].shape[1:]
        check_arrays(arrays["q"], arrays["k"], arrays["v"], segments, seq_len)
        layout = sequence_layout(self.options, seq_len, world)
        key = (kind, mask, segments is None, *((name, a.shape, str(a.dtype)) for name, a in arrays.items()))
        if key not in self._compiled:
            spec = attention_spec(self.options, self.mesh, "sp", seq_len, mask, head_dim)
            self._compiled[key] = self._build(kind, spec, len(arrays) + (segments is not None))
        order, inverse = layout.permutation(seq_len), layout.inverse(seq_len)
        given = [jnp.asarray(array[:, order]) for array in arrays.values()]
        if segments is not None:
            given.append(jnp.asarray(segments, jnp.int32)[:, order])
        return tuple(np.asarray(result)[:, inverse] for result in self._compiled[key](*given))

    def _build(self, kind: str, spec: AttentionSpec, count: int) -> Any:
        strategy = STRATEGIES[self.options.strategy]

        def forward(q, k, v, segments=None):  # type: ignore[no-untyped-def]
            return strategy.forward(q, k, v, segments, spec)

        def backward(q, k, v, dout, segments=None):  # type: ignore[no-untyped-def]
            _, pullback = jax.vjp(lambda a, b, c: strategy.attention(a, b, c, segments, spec), q, k, v)
            return pullback(dout)

        local = {"forward": forward, "backward": backward}[kind]
        shard = P(None, "sp")
        return jax.jit(
            jax.shard_map(local, mesh=self.mesh, in_specs=(shard,) * count, out_specs=shard, check_vma=False)
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
