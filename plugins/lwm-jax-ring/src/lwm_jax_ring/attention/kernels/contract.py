"""What computes the blocks of attention: the seam behind which kernels are exchanged.

A strategy brings keys to queries, one rank's at a time; a kernel lets the queries see them. It keeps a running softmax
between two arrivals, in whatever form suits it, so that nothing is merged that need not be. A kernel is static: a
frozen dataclass of its sizes, the softmax scale and the soft-cap, compared and hashed by value.

Accumulators are float32 whatever the inputs. lse is natural-log float32, −inf where a query has seen nothing; its out
is 0 and its gradients are 0.

Shapes: B batch, C tokens of the queries' rank, T keys that have arrived, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from lwm_core.errors import UnsupportedError
from lwm_jax_ring.attention.blocks import Keys, Queries


class Kernel(Protocol):
    """Attention of one rank's queries over keys that arrive in parts."""

    def queries(self, q: jax.Array, mask: Queries, kv_heads: int) -> Any:
        """``q [B,C,H,D]`` and its side of the mask, in the kernel's own form; made once for all arrivals."""
        ...

    def start(self, queries: Any) -> Any:
        """The state before any key."""
        ...

    def absorb(self, state: Any, queries: Any, k: jax.Array, v: jax.Array, keys: Keys) -> Any:
        """The state after the queries have seen ``k, v [B,T,K,D]``."""
        ...

    def finish(self, state: Any, length: int) -> tuple[jax.Array, jax.Array]:
        """out ``[B,C,H,D]`` and lse ``[B,C,H]``, float32, for ``length`` = C."""
        ...

    def saved(self, q: jax.Array, out: jax.Array, dout: jax.Array, lse: jax.Array, mask: Queries, kv_heads: int) -> Any:
        """What the backward pass needs of the queries, in the kernel's own form.

        ``out [B,C,H,D]`` and ``lse [B,C,H]`` are those over all keys; lse is +inf, not −inf, where a query saw nothing,
        so that its weights are 0.
        """
        ...

    def start_gradient(self, saved: Any) -> Any:
        """dq before any key."""
        ...

    def gradients(
        self, dq: Any, saved: Any, k: jax.Array, v: jax.Array, keys: Keys
    ) -> tuple[Any, jax.Array, jax.Array]:
        """dq with the share of these keys added, and their own dk and dv ``[B,T,K,D]`` float32."""
        ...

    def finish_gradient(self, dq: Any, length: int) -> jax.Array:
        """dq ``[B,C,H,D]`` float32."""
        ...


def row_sums(out: jax.Array, dout: jax.Array) -> jax.Array:
    """``[B,C,H]`` float32: the sum of out · dout, which the softmax's gradient takes off (arXiv 2307.08691, eq. 4)."""
    return (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(axis=-1)


def capped(scores: jax.Array, softcap: float | None) -> jax.Array:
    """Scores bent softly into ±softcap: ``cap · tanh(scores / cap)`` (Gemma 2, arXiv 2408.00118, section 2)."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def precision(x: jax.Array) -> lax.Precision:
    """Of a product of arrays like ``x``: full for float32, which JAX multiplies in TF32 on GPUs and in bfloat16 on TPUs
    unless it is told otherwise."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT


def not_differentiable(function: Callable[..., Any], kernel: str, static: tuple[int, ...]) -> Callable[..., Any]:
    """``function``, refused with a reason where JAX would differentiate it; ``static`` arguments are no arrays.

    The gradient rule of attention calls kernels and never differentiates them. What does is a gradient of lse, which no
    rule covers, and a derivative of the rule itself.
    """
    guarded = jax.custom_jvp(function, nondiff_argnums=static)

    @guarded.defjvp
    def refuse(*_: Any) -> Any:
        raise UnsupportedError(
            f"jax-ring: kernel {kernel!r} has no gradient of lse and no second derivatives; use kernel = 'xla'"
        )

    return guarded
