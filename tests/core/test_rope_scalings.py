"""RoPE scalings against published frequencies, numbers worked by hand, and a second writing of the formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_core.errors import ShapeError
from lwm_core.rope import RopeSpec, first_base_violation
from lwm_core.rope_scalings import SCALINGS, base_bound_theta, linear, llama3, ntk, yarn

# Frequencies that Hugging Face transformers publishes in its own tests (tests/utils/test_modeling_rope_utils.py,
# five digits): D = 128, theta = 10000, factor 10, original 2048, the defaults of each scaling. Pair → f'.
PUBLISHED_YARN = {
    0: 1.0, 16: 1.0e-1, 17: 8.3479e-2, 18: 6.9590e-2, 24: 2.2515e-2, 30: 6.6143e-3, 36: 1.5746e-3, 39: 6.2810e-4,
    40: 4.3007e-4, 41: 2.7384e-4, 63: 1.1548e-5,
}  # fmt: skip
PUBLISHED_LLAMA3 = {
    0: 1.0, 17: 8.6596e-2, 30: 1.3335e-2, 31: 1.0730e-2, 32: 7.7785e-3, 35: 2.8248e-3, 38: 8.9549e-4, 40: 3.4539e-4,
    41: 2.7384e-4, 63: 1.1548e-5,
}  # fmt: skip


@pytest.mark.parametrize(("scaling", "published"), [(yarn, PUBLISHED_YARN), (llama3, PUBLISHED_LLAMA3)])
def test_published_frequencies(scaling, published: dict[int, float]) -> None:  # type: ignore[no-untyped-def]
    frequencies = scaling(10_000.0, 128, factor=10.0, original=2048).inverse_frequencies(128)
    for pair, expected in published.items():
        assert frequencies[pair] == pytest.approx(expected, rel=5e-5), pair


def test_linear_divides_every_frequency() -> None:
    # D = 4, b = 10000: f = (1, 0.01); a quarter of each.
    np.testing.assert_allclose(linear(10_000.0, 4, factor=4.0).inverse_frequencies(4), [0.25, 0.0025], rtol=1e-15)


def test_ntk_keeps_the_first_and_stretches_the_last() -> None:
    # D = 4, b = 10000, s = 9: b' = 10000 · 9² = 810000, f = (1, 1/900); the last is 0.01 / 9.
    spec = ntk(10_000.0, 4, factor=9.0)
    assert spec.theta == pytest.approx(810_000.0, rel=1e-15)
    np.testing.assert_allclose(spec.inverse_frequencies(4), [1.0, 1 / 900], rtol=1e-14)
    with pytest.raises(ShapeError, match="one frequency"):
        ntk(10_000.0, 2, factor=2.0)


def test_yarn_by_hand() -> None:
    # D = 8, b = 10000: f = (1, 0.1, 0.01, 0.001). L0 = 2π · 100 turns: c(β) = 8·ln(100/β) / (2·ln 10⁴) = 2 − log₁₀ β.
    # With L0 rounded to 628, beta_fast 10 and beta_slow 0.1, untruncated: low = 1 − ε, high = 3 − ε, ε ≈ 2.2e-4, hence
    # r ≈ (0, 0, ½, 1); s = 4 gives factors (1, 1, 0.625, 0.25) but for the rounding.
    spec = yarn(10_000.0, 8, factor=4.0, original=628, beta_fast=10.0, beta_slow=0.1, truncate=False)
    assert spec.factors is not None
    np.testing.assert_allclose(spec.factors, [1.0, 1.0, 0.625, 0.25], atol=2e-4)
    assert spec.attention_factor == pytest.approx(1.1386294361119891)  # 1 + 0.1·ln 4
    assert spec.theta == 10_000.0


def test_yarn_truncates_outwards() -> None:
    # As above with beta_fast 5: c = 2 − log₁₀ 5 = 1.301 → 1 when truncated; beta_slow 0.2: c = 2.699 → 3.
    spec = yarn(10_000.0, 8, factor=4.0, original=628, beta_fast=5.0, beta_slow=0.2)
    assert spec.factors == pytest.approx([1.0, 1.0, 0.625, 0.25])


def test_llama3_by_hand() -> None:
    # D = 8, b = 10000: w = 2π·(1, 10, 100, 1000). L0 = 628 tokens are about (100, 10, 1, 0.1) turns. With low 1 and
    # high 19: pair 0 keeps f, pair 1 has t = (10 − 1) / 18 = ½, pairs 2 and 3 are divided by s = 8.
    spec = llama3(10_000.0, 8, factor=8.0, original=628, low_freq_factor=1.0, high_freq_factor=19.0)
    assert spec.factors is not None
    np.testing.assert_allclose(spec.factors, [1.0, 0.5 + 0.5 / 8, 1 / 8, 1 / 8], atol=3e-4)
    assert spec.attention_factor == 1.0


_settings = {
    "factor": st.floats(1.0, 512.0),
    "original": st.integers(16, 1 << 20),
    "half": st.integers(2, 128),
    "theta": st.floats(100.0, 1e9),
}


@given(**_settings)
def test_yarn_equals_the_formula_pair_by_pair(factor: float, original: int, half: int, theta: float) -> None:
    spec = yarn(theta, 2 * half, factor=factor, original=original)
    d = 2 * half
    low = max(0, math.floor(d * math.log(original / (32 * 2 * math.pi)) / (2 * math.log(theta))))
    high = min(d - 1, math.ceil(d * math.log(original / (2 * math.pi)) / (2 * math.log(theta))))
    low = min(low, d - 1)
    for i, got in enumerate(spec.inverse_frequencies(d)):
        plain = theta ** (-2 * i / d)
        share = (0.0 if i <= low else 1.0) if low == high else min(max((i - low) / (high - low), 0.0), 1.0)
        assert got == pytest.approx(plain * (1 - share) + plain / factor * share, rel=1e-9)


@given(**_settings)
def test_llama3_equals_the_three_cases(factor: float, original: int, half: int, theta: float) -> None:
    frequencies = llama3(theta, 2 * half, factor=factor, original=original).inverse_frequencies(2 * half)
    for i, got in enumerate(frequencies):
        f = theta ** (-2 * i / (2 * half))
        wavelength = 2 * math.pi / f
        if wavelength < original / 4.0:
            expected = f
        elif wavelength > original / 1.0:
            expected = f / factor
        else:
            smooth = (original / wavelength - 1.0) / (4.0 - 1.0)
            expected = (1 - smooth) * f / factor + smooth * f
        assert got == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["linear", "ntk", "yarn", "llama3"])
def test_factor_one_is_plain_rope(name: str) -> None:
    extra = {"original": 4096} if name in ("yarn", "llama3") else {}
    spec = SCALINGS[name](1e6, 64, factor=1.0, **extra)
    np.testing.assert_allclose(spec.inverse_frequencies(64), RopeSpec(1e6).inverse_frequencies(64), rtol=1e-15)
    assert spec.attention_factor == 1.0
    with pytest.raises(ShapeError, match=f"RoPE scaling '{name}': factor = 0.5; expected 1 or more"):
        SCALINGS[name](1e6, 64, factor=0.5, **extra)


def test_disordered_bands_are_refused() -> None:
    with pytest.raises(ShapeError, match="beta_fast > beta_slow"):
        yarn(1e4, 64, factor=2.0, original=4096, beta_fast=1.0, beta_slow=32.0)
    with pytest.raises(ShapeError, match="high_freq_factor > low_freq_factor"):
        llama3(1e4, 64, factor=2.0, original=4096, low_freq_factor=4.0, high_freq_factor=4.0)


def test_base_bound_fit_agrees_with_the_exact_bound() -> None:
    # 0.0424 · 32768^1.628 = 0.0424 · 2^24.42 = 0.0424 · 2.2447e7.
    assert base_bound_theta(32_768) == pytest.approx(9.5174e5, rel=1e-3)
    for length in (4096, 16_384, 32_768):
        assert first_base_violation(RopeSpec(2 * base_bound_theta(length)), 128, length) is None
        assert first_base_violation(RopeSpec(0.4 * base_bound_theta(length)), 128, length) is not None
