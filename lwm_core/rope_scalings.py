"""RoPE scalings by name: what a longer context does to each frequency, as factors of a ``RopeSpec``.

Symbols: b base (theta), D head dim, i = 0 … D/2−1 the pair, f_i = b^(−2i/D) its frequency in radians a token,
L0 the length the model was trained at (``original``), s the factor by which it is stretched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from lwm_core.errors import ShapeError
from lwm_core.rope import RopeScaling, RopeSpec


def none(theta: float, head_dim: int) -> RopeSpec:
    """Plain RoPE (arXiv 2104.09864): every factor 1."""
    return RopeSpec(theta)


def linear(theta: float, head_dim: int, *, factor: float) -> RopeSpec:
    """Position interpolation (arXiv 2306.15595, equation 4): f_i / s, the same as position / s.

    Raises:
        ShapeError: ``factor`` is below 1.
    """
    _stretches("linear", factor)
    return RopeSpec(theta, factors=(1.0 / factor,) * (head_dim // 2), scaling=RopeScaling("linear", {"factor": factor}))


def ntk(theta: float, head_dim: int, *, factor: float) -> RopeSpec:
    """NTK-aware base change (arXiv 2309.00071, section 3.1): b' = b·s^(D/(D−2)).

    The last frequency becomes f / s exactly, the first stays 1.

    Raises:
        ShapeError: ``factor`` is below 1, or there is one frequency only.
    """
    _stretches("ntk", factor)
    if head_dim <= 2:
        raise ShapeError(f"RoPE scaling 'ntk': head dim {head_dim} has one frequency; expected 4 or more")
    return RopeSpec(theta * factor ** (head_dim / (head_dim - 2)))


def yarn(
    theta: float, head_dim: int, *, factor: float, original: int, beta_fast: float = 32.0, beta_slow: float = 1.0,
    truncate: bool = True, attention_factor: float | None = None,
) -> RopeSpec:  # fmt: skip
    """YaRN (arXiv 2309.00071, equations 17 to 22): interpolate the slow frequencies, keep the fast.

    The pair that turns β times over L0 is c(β) = D·ln(L0 / 2πβ) / (2 ln b). With low = ⌊c(beta_fast)⌋ and
    high = ⌈c(beta_slow)⌉, r_i = clip((i − low) / (high − low), 0, 1) and f'_i = f_i·(1 − r_i) + (f_i / s)·r_i.

    Args:
        theta: b.
        head_dim: D.
        factor: s.
        original: L0 in tokens.
        beta_fast: turns over L0 at and above which a frequency stays.
        beta_slow: turns over L0 at and below which a frequency is divided by s.
        truncate: round low and high to whole pairs, as the paper's code does.
        attention_factor: multiplies cos and sin; 0.1·ln s + 1 by default (equation 22).

    Raises:
        ShapeError: ``factor`` is below 1, ``theta`` is not above 1, or the betas are not positive and ordered.
    """
    _stretches("yarn", factor)
    if attention_factor is None:
        attention_factor = 0.1 * math.log(factor) + 1.0
    if not (beta_fast > beta_slow > 0 and theta > 1):
        raise ShapeError(
            f"RoPE scaling 'yarn': beta_fast = {beta_fast}, beta_slow = {beta_slow}, theta = {theta}; "
            "expected beta_fast > beta_slow > 0 and theta > 1"
        )

    def pair_with_turns(turns: float) -> float:
        return head_dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))

    low, high = pair_with_turns(beta_fast), pair_with_turns(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = (min(max(edge, 0.0), head_dim - 1.0) for edge in (low, high))
    if low == high:
        high += 0.001  # the paper's code: a step instead of a division by zero
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    return RopeSpec(
        theta,
        factors=_tuple(1.0 - ramp + ramp / factor),
        attention_factor=attention_factor,
        scaling=RopeScaling("yarn", {
            "factor": factor, "original": original, "beta_fast": beta_fast, "beta_slow": beta_slow,
            "truncate": truncate, "attention_factor": attention_factor,
        }),
    )  # fmt: skip


def llama3(
    theta: float, head_dim: int, *, factor: float, original: int, low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
) -> RopeSpec:  # fmt: skip
    """Llama 3.1's scaling (arXiv 2407.21783 and its released code), by the wavelength w = 2π / f_i.

    w < L0 / high keeps f; w > L0 / low gives f / s; between them t = (L0/w − low) / (high − low) and
    f' = (1 − t)·f / s + t·f. Llama 3.1 itself: s = 8, L0 = 8192, low = 1, high = 4.

    Raises:
        ShapeError: ``factor`` is below 1, or the frequency factors are not positive and ordered.
    """
    _stretches("llama3", factor)
    if not high_freq_factor > low_freq_factor > 0:
        raise ShapeError(
            f"RoPE scaling 'llama3': high_freq_factor = {high_freq_factor}, low_freq_factor = {low_freq_factor}; "
            "expected high_freq_factor > low_freq_factor > 0"
        )
    turns = original * RopeSpec(theta).inverse_frequencies(head_dim) / (2 * math.pi)
    # Clipping t joins the three cases: the blend is f / s at t = 0 and f at t = 1.
    blend = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
    words = {
        "factor": factor, "original": original, "low_freq_factor": low_freq_factor,
        "high_freq_factor": high_freq_factor,
    }  # fmt: skip
    return RopeSpec(theta, factors=_tuple((1.0 - blend) / factor + blend), scaling=RopeScaling("llama3", words))


SCALINGS: Mapping[str, Callable[..., RopeSpec]] = MappingProxyType(
    {"none": none, "linear": linear, "ntk": ntk, "yarn": yarn, "llama3": llama3}
)
"""Name → ``scaling(theta, head_dim, **parameters)``."""


def base_bound_theta(seq_len: int) -> float:
    """0.0424·L^1.628, a fit of the smallest base for length L at D = 128 (arXiv 2405.14591, table 2's power law).

    The bound itself is Σ_i cos(m·f_i) ≥ 0 for every distance m ≤ L; ``lwm_core.rope.first_base_violation`` checks it
    exactly. It is necessary in theory, and no promise.
    """
    return 0.0424 * math.pow(seq_len, 1.628)


def _stretches(name: str, factor: float) -> None:
    if not factor >= 1:
        raise ShapeError(f"RoPE scaling {name!r}: factor = {factor}; expected 1 or more, the new length over the old")


def _tuple(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
