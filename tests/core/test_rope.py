"""RoPE: frequencies by the formula, angles that stay right a million tokens out, and the base's bound."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_core.errors import ShapeError
from lwm_core.rope import RopeSpec, first_base_violation


@given(st.sampled_from([2, 64, 128]), st.floats(10.0, 5e8), st.integers(0, 2_000_000))
def test_angles_by_the_formula(head_dim: int, theta: float, position: int) -> None:
    cos, sin = RopeSpec(theta).tables([position], head_dim)
    for i in range(head_dim // 2):
        angle = position * theta ** (-2 * i / head_dim)
        # Two float64 roundings of the exponent and the power, seen through an angle of that size.
        tolerance = 1e-12 + 4e-16 * max(1.0, abs(angle)) * (1 + math.log(theta))
        assert abs(cos[0, i] - math.cos(angle)) < tolerance
        assert abs(sin[0, i] - math.sin(angle)) < tolerance


def test_a_million_tokens_out() -> None:
    """Angles formed in float32 are wrong in the second digit there; these are not."""
    from fractions import Fraction

    position = 1_000_003
    cos, _ = RopeSpec(10_000.0).tables([position], 4)
    # Frequencies of head dim 4 are 1 and 1/100, so the angles are known exactly.
    turns = Fraction(position, 100)
    assert cos[0].tolist() == pytest.approx([math.cos(position), math.cos(float(turns))], abs=1e-10)
    narrow = np.cos(np.float32(position) * np.float32(10_000.0) ** np.float32(-6 / 128))
    wide = RopeSpec(10_000.0).tables([position], 128)[0][0, 3]
    assert abs(float(narrow) - wide) > 1e-3


def test_factors_and_attention_factor() -> None:
    plain = RopeSpec(500.0).inverse_frequencies(4)
    assert plain.dtype == np.float64 and plain[0] == 1.0
    scaled = RopeSpec(500.0, factors=(0.5, 0.25), attention_factor=1.25)
    assert scaled.inverse_frequencies(4).tolist() == [plain[0] * 0.5, plain[1] * 0.25]
    cos, sin = scaled.tables([[3]], 4)
    assert cos.shape == sin.shape == (1, 1, 2)
    assert np.allclose(cos**2 + sin**2, 1.25**2, atol=1e-15, rtol=0)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: RopeSpec(0.0),
        lambda: RopeSpec(-1.0),
        lambda: RopeSpec(float("nan")),
        lambda: RopeSpec(factors=(1.0, 0.0)),
        lambda: RopeSpec().inverse_frequencies(3),
        lambda: RopeSpec(factors=(1.0,)).inverse_frequencies(4),
    ],
)
def test_wrong_specs_are_refused(wrong) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ShapeError):
        wrong()


@pytest.mark.parametrize(("theta", "head_dim"), [(10_000.0, 64), (100.0, 16), (500.0, 128)])
def test_first_base_violation_against_a_walk(theta: float, head_dim: int) -> None:
    def total(m: int) -> float:
        return sum(math.cos(m * theta ** (-2 * i / head_dim)) for i in range(head_dim // 2))

    walked = next((m for m in range(5000) if total(m) < 0), None)
    for chunk in (7, 65_536):
        assert first_base_violation(RopeSpec(theta), head_dim, 4999, chunk=chunk) == walked


def test_first_base_violation_looks_as_far_as_asked() -> None:
    rope = RopeSpec(100.0)
    first = first_base_violation(rope, 16, 10_000)
    assert first is not None
    assert first_base_violation(rope, 16, first) == first
    assert first_base_violation(rope, 16, first - 1) is None
