"""cuDNN's fused attention as JAX binds it: the one place where JAX's private names for it are used.

The public ``jax.nn.dot_product_attention`` gives lse but takes none back, which the backward pass of a ring needs; the
primitives below it do. lse is natural-log float32 (FlashAttention-2, arXiv 2307.08691, section 3.1.1).

Shapes: B batch, c tokens, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lwm_core.errors import UnsupportedError
from lwm_jax_ring.attention.kernels.contract import not_differentiable


def primitives() -> Any:
    """JAX's module of cuDNN's attention.

    Raises:
        UnsupportedError: this JAX has other names for them.
    """
    try:
        from jax._src.cudnn import fused_attention_stablehlo as found

        for name in ("_dot_product_attention_fwd_p", "_dot_product_attention_bwd_p", "MaskType", "AttentionLayout"):
            getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(
            f"jax-ring: kernel 'cudnn' does not know cuDNN's attention in jax {jax.__version__} ({error}); "
            "use kernel = 'xla', or the jax of constraints.txt"
        ) from error
    return found


@dataclass(frozen=True)
class CudnnFused:
    """See :class:`~lwm_jax_ring.attention.kernels.fused.Fused`."""

    dtypes: tuple[str, ...] = ("bfloat16",)

    def static(self, causal: bool) -> dict[str, Any]:
        """What cuDNN is told beside arrays."""
        module = primitives()
        kind = module.MaskType.CAUSAL if causal else module.MaskType.NO_MASK
        return {
            "scale": 1.0, "seed": 42, "dropout_rate": 0.0, "variadic_args": (False, False), "mask_type": kind,
            "layout": module.AttentionLayout.BTNH.value, "sliding_window_length": None,
        }  # fmt: skip

    def forward(self, q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> tuple[jax.Array, jax.Array]:
        found: tuple[jax.Array, jax.Array] = _forward(self, causal, q, k, v)
        return found

    def backward(
        self, q: jax.Array, k: jax.Array, v: jax.Array, out: jax.Array, lse: jax.Array, dout: jax.Array, causal: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        found: tuple[jax.Array, jax.Array, jax.Array] = _backward(self, causal, q, k, v, out, lse, dout)
        return found


def _call_forward(fused: CudnnFused, causal: bool, q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
    absent = [jnp.zeros(0, jnp.int32)] * 6  # lengths, offsets and page tables
    out, lse = primitives()._dot_product_attention_fwd_p.bind(
        q, k, v, jnp.zeros(0, q.dtype), *absent, is_training=True, **fused.static(causal)
    )
    return out, jnp.swapaxes(lse, 1, 2)


def _call_backward(
    fused: CudnnFused, causal: bool, q: jax.Array, k: jax.Array, v: jax.Array, out: jax.Array, lse: jax.Array,
    dout: jax.Array,
) -> Any:  # fmt: skip
    absent = [jnp.zeros(0, jnp.int32)] * 6
    dq, dk, dv = primitives()._dot_product_attention_bwd_p.bind(
        q, k, v, jnp.zeros(0, q.dtype), *absent, jnp.swapaxes(lse, 1, 2), out, dout, **fused.static(causal)
    )
    return dq, dk, dv


_forward = not_differentiable(_call_forward, "cudnn", (0, 1))
_backward = not_differentiable(_call_backward, "cudnn", (0, 1))
