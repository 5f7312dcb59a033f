"""Rotary position embedding: the frequencies, in float64; frameworks turn them into float32 angles.

RoPE (arXiv 2104.09864) rotates pair i of a head by ``position · f_i`` with ``f_i = theta^(-2i/D)``. Longer contexts
take a larger ``theta`` (LWM: 1e6 at 32K to 5e7 at 1M) or scale single frequencies; a scaling is carried here as one
factor a frequency, so that whoever applies it needs no name and no formula. Rotation is of the two halves of a head
(Llama as Hugging Face stores it), not of interleaved pairs.

Shapes: D head dim, S sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lwm_core.errors import ShapeError


@dataclass(frozen=True)
class RopeScaling:
    """The name and parameters of the scaling that factors came from, to say it in those words to others.

    Args:
        name: one of ``lwm_core.rope_scalings.SCALINGS``.
        parameters: what that scaling takes, theta and head dim aside.
    """

    name: str
    parameters: Mapping[str, float]


@dataclass(frozen=True)
class RopeSpec:
    """A model's rotary embedding.

    Args:
        theta: the base.
        factors: ``D/2`` multipliers of the frequencies, from a context plugin's scaling; None for plain RoPE.
        attention_factor: multiplies cos and sin (YaRN's temperature); logits scale by its square.
        scaling: where the factors came from, if that is known; nothing is computed from it.

    Raises:
        ShapeError: theta is not positive, or a factor is not.
    """

    theta: float = 10_000.0
    factors: tuple[float, ...] | None = None
    attention_factor: float = 1.0
    scaling: RopeScaling | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not self.theta > 0:
            raise ShapeError(f"RoPE: theta is {self.theta}; expected a positive number")
        if self.factors is not None and not all(factor > 0 for factor in self.factors):
            raise ShapeError("RoPE: every frequency factor must be positive")

    def inverse_frequencies(self, head_dim: int) -> NDArray[np.float64]:
        """``[D/2]`` float64: ``f_i``, angle a position in radians.

        Raises:
            ShapeError: the head dim is odd, or the factors are not half of it.
        """
        if head_dim % 2:
            raise ShapeError(f"RoPE: head dim {head_dim} is odd; it rotates pairs, so it must be even")
        frequencies = np.float64(self.theta) ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.factors is None:
            return frequencies
        if len(self.factors) != head_dim // 2:
            raise ShapeError(f"RoPE: {len(self.factors)} factors for head dim {head_dim}; expected {head_dim // 2}")
        return frequencies * np.asarray(self.factors, dtype=np.float64)

    def tables(self, positions: ArrayLike, head_dim: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """cos and sin, each ``[..., D/2]`` float64 for positions ``[...]``, attention factor included."""
        angles = np.asarray(positions, dtype=np.float64)[..., None] * self.inverse_frequencies(head_dim)
        return np.cos(angles) * self.attention_factor, np.sin(angles) * self.attention_factor


def first_base_violation(rope: RopeSpec, head_dim: int, seq_len: int, *, chunk: int = 65_536) -> int | None:
    """The first distance m ≤ ``seq_len`` at which ``Σ_i cos(m·f_i) < 0``, or None.

    Beyond it a random key attracts more than a similar one (arXiv 2405.14591): necessary for retrieval in theory, no
    proof of failure.
    """
    frequencies = rope.inverse_frequencies(head_dim)
    # Σ cos((a+b)·f) = Σ cos(a·f)·cos(b·f) − sin(a·f)·sin(b·f): a matrix product over few a and few b.
    steps = np.arange(min(chunk, 1024), dtype=np.float64)
    near = _waves(steps, frequencies) * np.repeat([1.0, -1.0], len(frequencies))
    for start in range(0, seq_len + 1, chunk):
        end = min(start + chunk, seq_len + 1)
        sums = (_waves(np.arange(start, end, len(steps), dtype=np.float64), frequencies) @ near.T).ravel()
        # What rounding could have turned is summed again as it is defined.
        doubtful = start + np.flatnonzero(sums[: end - start] < 1e-6)
        negative = doubtful[np.cos(doubtful[:, None] * frequencies).sum(axis=1) < 0]
        if negative.size:
            return int(negative[0])
    return None


def _waves(distances: NDArray[np.float64], frequencies: NDArray[np.float64]) -> NDArray[np.float64]:
    """``[len(distances), D]``: cosines, then sines."""
    angles = distances[:, None] * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
