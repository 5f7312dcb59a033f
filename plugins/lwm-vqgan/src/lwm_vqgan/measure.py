"""How well a VQGAN keeps pictures: PSNR, SSIM, and how much of the codebook it uses.

Shapes: T frames [T,H,W,3] uint8.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from lwm_core.errors import DataError
from lwm_core.protocols import VisionEncoder

_PEAK = 255.0
_WINDOW, _SIGMA = 11, 1.5


@dataclass(frozen=True)
class Measured:
    """What a set of frames gave.

    Args:
        frames: how many there were.
        psnr: peak signal-to-noise ratio in dB, of each frame, then the mean over frames.
        worst_psnr: that of the worst frame.
        ssim: structural similarity, the mean over frames.
        codes_used: distinct codes over all frames.
        usage: ``codes_used`` over the size of the codebook.
        perplexity: e to the entropy of the codes' frequencies: as many codes, used alike, would say as much.
    """

    frames: int
    psnr: float
    worst_psnr: float
    ssim: float
    codes_used: int
    usage: float
    perplexity: float


def measure(encoder: VisionEncoder, frames: NDArray[np.uint8]) -> Measured:
    """Encode and decode ``frames`` and compare.

    Raises:
        DataError: there is no frame.
        ShapeError: the frames are not of the encoder's size.
    """
    if not len(frames):
        raise DataError("there is no frame to measure")
    codes = encoder.encode(frames)
    made = encoder.decode(codes)
    ratios = psnr(made, frames)
    counts = np.bincount(codes.ravel(), minlength=encoder.codes)
    shares = counts[counts > 0] / codes.size
    return Measured(
        frames=len(frames), psnr=float(ratios.mean()), worst_psnr=float(ratios.min()),
        ssim=float(ssim(made, frames).mean()), codes_used=len(shares), usage=len(shares) / encoder.codes,
        perplexity=float(np.exp(-(shares * np.log(shares)).sum())),
    )  # fmt: skip


def psnr(made: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> NDArray[np.float64]:
    """``10 log10(255² / mean squared error)`` of each frame: two [T,H,W,3] → [T]; inf where they are equal."""
    error = np.square(made.astype(np.float64) - wanted).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return np.asarray(10 * np.log10(_PEAK * _PEAK / error))


def ssim(made: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Structural similarity of each frame: two [T,H,W,3] → [T], 1 where they are equal.

    Wang et al. 2004, "Image quality assessment", equation 13: a Gaussian window of 11 × 11 with deviation 1.5, where
    it fits whole, K = 0.01 and 0.03; each colour channel by itself, then the mean.
    """
    offsets = np.arange(_WINDOW) - _WINDOW // 2
    window = np.exp(-0.5 * np.square(offsets / _SIGMA))
    window /= window.sum()

    def blurred(x: NDArray[np.float64]) -> NDArray[np.float64]:
        for axis in (1, 2):
            x = sliding_window_view(x, _WINDOW, axis=axis) @ window
        return x

    x, y = made.astype(np.float64), wanted.astype(np.float64)
    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    cov = blurred(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2
    score = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return np.asarray(score.mean(axis=(1, 2, 3)))
