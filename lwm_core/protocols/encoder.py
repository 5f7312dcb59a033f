"""What an encoder plugin gives: frames to codes and back."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@runtime_checkable
class VisionEncoder(Protocol):
    """Frames to codes and back, NumPy in and out.

    Attributes:
        codes: entries of the codebook; every code is below it.
        frame_size: sides H = W of a frame, in pixels.
        checksum: SHA-256, in hex, of all that decides on the codes (the weights and their shape): codes of one encoder
            are read by another only where this is the same.
    """

    codes: int
    frame_size: int
    checksum: str

    def encode(self, frames: NDArray[np.uint8]) -> NDArray[np.int32]:
        """``[T,H,W,3]`` uint8 → ``[T, h·w]`` int32."""
        ...

    def decode(self, codes: NDArray[np.int32]) -> NDArray[np.uint8]:
        """``[T, h·w]`` int32 → ``[T,H,W,3]`` uint8."""
        ...
