"""The tolerance helper, against figures worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lwm_core.testing import assert_close, assert_no_worse, relative_l2

INF = float("inf")


@pytest.mark.parametrize(
    ("actual", "expected", "error"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([3.0, 4.5], [3.0, 4.0], 0.1),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([1e-30], [0.0], INF),
        ([-INF, 5.0], [-INF, 4.0], 0.25),
        ([-INF, 4.0], [1.0, 4.0], INF),
        ([1.0, 4.0], [-INF, 4.0], INF),
        ([float("nan"), 4.0], [1.0, 4.0], INF),
        ([INF, 4.0], [INF, 4.0], INF),
        ([1.0], [1.0, 2.0], INF),
    ],
)
def test_relative_l2(actual: list[float], expected: list[float], error: float) -> None:
    assert relative_l2(actual, expected) == pytest.approx(error, abs=0.0, rel=1e-12)


def test_the_error_is_taken_in_float64() -> None:
    """In float32 the difference of these two would vanish against the norm's own rounding."""
    assert relative_l2(np.full(4, 1 + 1e-9), np.ones(4)) == pytest.approx(1e-9, rel=1e-6)


@pytest.mark.parametrize(
    ("actual", "expected", "told"),
    [
        ([1.0, 1.1], [1.0, 1.0], "relative L2 error 0.0707 is over 0.01"),
        ([0.0, 1.0], [-INF, 1.0], "-inf differs in 1 of 2"),
        ([-INF, 1.0], [0.0, 1.0], "-inf differs in 1 of 2"),
        ([float("nan"), 1.0], [0.0, 1.0], "1 of 2 values are not finite"),
        ([[1.0]], [1.0], r"shape \(1, 1\), expected \(1,\)"),
    ],
)
def test_assert_close_says_what_is_wrong(actual: list[float], expected: list[float], told: str) -> None:
    with pytest.raises(AssertionError, match=f"lse: {told}"):
        assert_close(actual, expected, 0.01, "lse")


def test_assert_close_accepts_up_to_the_tolerance() -> None:
    assert_close([-INF, 1.0, 1.0001], [-INF, 1.0, 1.0], 1e-4, "lse")


def test_no_worse_scales_one_devices_error() -> None:
    assert_no_worse([1.014], [1.0], [1.01], "out")
    with pytest.raises(AssertionError, match="out"):
        assert_no_worse([1.016], [1.0], [1.01], "out")
    with pytest.raises(AssertionError, match="single-device"):
        assert_no_worse([1.0], [1.0], [float("nan")], "out")
