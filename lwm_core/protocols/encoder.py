"""What an encoder plugin gives: frames to codes and back."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@runtime_checkable
class VisionEncoder(Protocol):
    """Frames to codes and back, NumPy in and out."""

    codes: int
    frame_size: int

    def encode(self, frames: NDArray[np.uint8]) -> NDArray[np.int32]:
        """``[T,H,W,3]`` uint8 → ``[T, h·w]`` int32."""
        ...

    def decode(self, codes: NDArray[np.int32]) -> NDArray[np.uint8]:
        """``[T, h·w]`` int32 → ``[T,H,W,3]`` uint8."""
        ...
