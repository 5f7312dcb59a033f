"""Inside a kernel: matrix products, logits and masks of one pair of blocks, in the layouts that a TPU likes.

A vector of one number a query is a row ``[1, n]`` where it lies in memory (compact), and a column ``[n, 128]`` of
equal lanes where it meets scores whose rows are queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lwm_core.errors import ShapeError
from lwm_jax_ring.attention.kernels.contract import precision
from lwm_jax_ring.attention.kernels.pallas_tpu.plan import LANES

UNSEEN = -2.0e38
"""The logit of a key that is not seen. Finite, since −inf − −inf is not a number."""

LOWEST = -1.0e38
"""The running maximum before any key: so far above UNSEEN that keys unseen have weight 0 in a row that saw nothing."""

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Logits:
    """From products q·k to logits: times ``scale``; with a ``softcap``, then ``softcap · tanh(logits / softcap)``."""

    scale: float
    softcap: float | None

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ShapeError(f"pallas-tpu: scale is {self.scale}; expected a positive number")
        if self.softcap is not None and not self.softcap > 0:
            raise ShapeError(f"pallas-tpu: softcap is {self.softcap}; expected a positive number or None")

    @property
    def unit(self) -> float:
        """What one of :meth:`unscaled` is worth as a logit."""
        return self.scale if self.softcap is None else 1.0

    def unscaled(self, products: jax.Array) -> jax.Array:
        """Logits divided by :attr:`unit`: the products themselves where there is no softcap."""
        return products if self.softcap is None else self.capped(products)

    def capped(self, products: jax.Array) -> jax.Array:
        """The logits."""
        if self.softcap is None:
            return products * self.scale
        return jnp.tanh(products * (self.scale / self.softcap)) * self.softcap

    def slope(self, logits: jax.Array) -> jax.Array | float:
        """Derivative of the logits with respect to the scaled products."""
        if self.softcap is None:
            return 1.0
        ratio = logits * (1.0 / self.softcap)
        return 1.0 - ratio * ratio


def dot(a: jax.Array, b: jax.Array, over_a: int, over_b: int) -> jax.Array:
    """The product of two matrices over one dimension of each: float32, and in full precision if they are float32."""
    dims = (((over_a,), (over_b,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision(a), preferred_element_type=jnp.float32)


def column(row: jax.Array) -> jax.Array:
    """``[1, n]`` → ``[n, 128]``."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def row(column: jax.Array) -> jax.Array:
    """``[n, 128]`` of equal lanes → ``[1, n]``."""
    return column.T[:1]


def across(column: jax.Array, width: int) -> jax.Array:
    """``[n, 128]`` of equal lanes → ``[n, width]``."""
    return column[:, :width] if width <= LANES else jnp.tile(column, (1, width // LANES))


def fields(ref: Any) -> list[jax.Array]:
    """The rows ``[1, n]`` of ``plan.query_rows`` or ``plan.key_rows`` in a kernel."""
    return [ref[i : i + 1, :] for i in range(ref.shape[0])]


def seen(of_queries: list[jax.Array], of_keys: list[jax.Array]) -> jax.Array:
    """Which queries see which keys, from the fields of both, the ones as rows and the others spread out to columns."""
    low, high, *q_segments = of_queries
    index, *k_segments = of_keys
    result = (low <= index) & (index <= high)
    return result & (q_segments[0] == k_segments[0]) if q_segments else result


def parts(length: int, limit: int) -> list[slice]:
    """A block of keys in parts of at most ``limit`` and a multiple of 128: what is computed at once."""
    size = next(size for size in range(min(limit, length), 0, -LANES) if length % size == 0)
    return [slice(start, start + size) for start in range(0, length, size)]
