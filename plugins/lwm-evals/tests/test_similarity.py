"""PSNR and SSIM against the formulas of the papers, written out pixel by pixel."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lwm_core.errors import ShapeError
from lwm_evals.similarity import psnr, ssim

Frames = NDArray[np.uint8]


def noisy(seed: int, shape: tuple[int, ...] = (2, 15, 13, 3), amount: int = 60) -> tuple[Frames, Frames]:
    random = np.random.default_rng(seed)
    clean = random.integers(0, 256, shape)
    return clean.astype(np.uint8), np.clip(clean + random.integers(-amount, amount + 1, shape), 0, 255).astype(np.uint8)


def ssim_by_hand(a: Frames, b: Frames) -> float:
    """Equation 13 of Wang et al. 2004 for one frame: one loop a window, one a pixel in it."""
    weights = {}
    for i in range(-5, 6):
        for j in range(-5, 6):
            weights[i, j] = math.exp(-(i * i + j * j) / (2 * 1.5**2))
    total = sum(weights.values())
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    found = []
    for channel in range(3):
        for y in range(5, a.shape[0] - 5):
            for x in range(5, a.shape[1] - 5):
                cells = [(w / total, float(a[y + i, x + j, channel]), float(b[y + i, x + j, channel]))
                         for (i, j), w in weights.items()]  # fmt: skip
                ma, mb = sum(w * p for w, p, _ in cells), sum(w * q for w, _, q in cells)
                va, vb = sum(w * (p - ma) ** 2 for w, p, _ in cells), sum(w * (q - mb) ** 2 for w, _, q in cells)
                cov = sum(w * (p - ma) * (q - mb) for w, p, q in cells)
                found.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return math.fsum(found) / len(found)


@pytest.mark.parametrize("amount", [3, 60, 255])
def test_ssim_is_the_papers_formula(amount: int) -> None:
    a, b = noisy(amount, amount=amount)
    assert ssim(b, a) == pytest.approx([ssim_by_hand(x, y) for x, y in zip(a, b, strict=True)], rel=1e-10)


def test_ssim_is_scipys() -> None:
    """The window by a library that has one of its own."""
    ndimage = pytest.importorskip("scipy.ndimage")
    a, b = noisy(7, (1, 40, 33, 3))

    def mean(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(ndimage.gaussian_filter(x, (1.5, 1.5, 0), radius=(5, 5, 0))[5:-5, 5:-5])

    x, y = a[0].astype(float), b[0].astype(float)
    mx, my = mean(x), mean(y)
    c1, c2 = 6.5025, 58.5225
    score = (2 * mx * my + c1) * (2 * (mean(x * y) - mx * my) + c2)
    score /= (mx**2 + my**2 + c1) * (mean(x * x) - mx**2 + mean(y * y) - my**2 + c2)
    assert ssim(a, b)[0] == pytest.approx(score.mean(), rel=1e-12)


@given(st.integers(0, 255), st.integers(0, 255))
@settings(max_examples=30)
def test_of_two_plain_frames_by_hand(one: int, other: int) -> None:
    a, b = (np.full((1, 12, 12, 3), value, np.uint8) for value in (one, other))
    expected = math.inf if one == other else 20 * math.log10(255 / abs(one - other))
    assert psnr(a, b)[0] == pytest.approx(expected)
    c1 = (0.01 * 255) ** 2
    assert ssim(a, b)[0] == pytest.approx((2 * one * other + c1) / (one**2 + other**2 + c1))


def test_psnr_of_a_known_error() -> None:
    """One value of 8·8·3 is wrong by 100: MSE 10000/192."""
    a = np.full((2, 8, 8, 3), 50, np.uint8)
    b = a.copy()
    b[0, 3, 3, 1] = 150
    assert psnr(b, a).tolist() == pytest.approx([10 * math.log10(255**2 * 192 / 10_000), math.inf])


def test_what_cannot_be_compared_is_refused() -> None:
    a, _ = noisy(0)
    with pytest.raises(ShapeError, match=r"\[2, 15, 13, 3\] and \[1, 15, 13, 3\]"):
        psnr(a, a[:1])
    with pytest.raises(ShapeError, match="expected at least 11 a side"):
        ssim(a[:, :10], a[:, :10])
    with pytest.raises(ShapeError, match="frames to compare"):
        ssim(a[:0], a[:0])
