"""How alike two pictures are: PSNR and SSIM.

Shapes: T frames [T,H,W,3] uint8, compared one with one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lwm_core.errors import ShapeError

PEAK = 255.0

WINDOW, DEVIATION = 11, 1.5
"""Pixels of SSIM's Gaussian window, and its standard deviation."""

K1, K2 = 0.01, 0.03

Frames = NDArray[np.uint8]


def psnr(made: Frames, wanted: Frames) -> NDArray[np.float64]:
    """``[T]``: peak signal-to-noise ratio in dB, ``10 log10(255² / mean squared error)``; inf where two are equal."""
    _check(made, wanted)
    error = np.square(made.astype(np.float64) - wanted).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return np.asarray(10 * np.log10(PEAK**2 / error))


def ssim(made: Frames, wanted: Frames) -> NDArray[np.float64]:
    """``[T]``: structural similarity, 1 where two are equal.

    Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural similarity", IEEE
    TIP 13(4), 2004: equation 13 with a Gaussian window of 11 × 11 that sums to 1, only where it fits whole; each colour
    by itself, and the mean over all of it.

    Raises:
        ShapeError: a frame is smaller than the window.
    """
    _check(made, wanted)
    if min(made.shape[1:3]) < WINDOW:
        raise ShapeError(f"ssim: frames are {made.shape[1]} × {made.shape[2]}; expected at least {WINDOW} a side")
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    found = np.empty(len(made))
    for t, (one, other) in enumerate(zip(made, wanted, strict=True)):  # one at a time: memory is that of a frame
        x, y = one.astype(np.float64), other.astype(np.float64)
        mean_x, mean_y = _windowed(x), _windowed(y)
        variance_x, variance_y = _windowed(x * x) - mean_x**2, _windowed(y * y) - mean_y**2
        covariance = _windowed(x * y) - mean_x * mean_y
        alike = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
        found[t] = (alike / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))).mean()
    return found


def _windowed(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """``[H-10, W-10, 3]``: the mean under the window around each pixel that it fits around."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    window = np.exp(-0.5 * np.square(offsets / DEVIATION))
    window /= window.sum()
    for axis in (0, 1):  # the window is a product of one down and one across
        size = x.shape[axis] - WINDOW + 1
        x = np.sum([w * np.take(x, np.arange(i, i + size), axis=axis) for i, w in enumerate(window)], axis=0)
    return x


def _check(made: Frames, wanted: Frames) -> None:
    if made.shape != wanted.shape or made.ndim != 4 or not len(made):
        raise ShapeError(
            f"frames to compare are {list(made.shape)} and {list(wanted.shape)}; expected the same [T, H, W, 3]"
        )
