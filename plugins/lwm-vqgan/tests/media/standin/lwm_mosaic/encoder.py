"""Mean colours of a grid of 4 × 4 squares, four bits a channel: 4096 codes, 16 a frame.

Shapes: T frames of sides S, 16 codes a frame.
"""

from __future__ import annotations

import hashlib
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field


class MosaicOptions(BaseModel):
    """How it codes, and how long it takes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    frame_size: int = Field(64, gt=0, multiple_of=4)
    weights: str = Field("a", description="anything; part of the checksum")
    frame_seconds: float = Field(0.0, ge=0, description="sleep a frame")


class Mosaic:
    """See the module."""

    codes = 4096

    def __init__(self, options: MosaicOptions) -> None:
        self.frame_size = options.frame_size
        self.checksum = hashlib.sha256(options.weights.encode()).hexdigest()
        self.codes_per_frame = 16
        self._seconds = options.frame_seconds

    def encode(self, frames: NDArray[np.uint8]) -> NDArray[np.int32]:
        count, side = len(frames), self.frame_size // 4
        assert frames.shape == (count, self.frame_size, self.frame_size, 3) and frames.dtype == np.uint8
        time.sleep(self._seconds * count)
        squares = frames.reshape(count, 4, side, 4, side, 3).mean(axis=(2, 4)).astype(np.int32) >> 4
        return ((squares[..., 0] << 8) | (squares[..., 1] << 4) | squares[..., 2]).reshape(count, 16)

    def decode(self, codes: NDArray[np.int32]) -> NDArray[np.uint8]:
        squares = np.stack([codes >> 8, (codes >> 4) & 15, codes & 15], axis=-1).reshape(-1, 4, 4, 3) * 16 + 8
        side = self.frame_size // 4
        return squares.repeat(side, axis=1).repeat(side, axis=2).astype(np.uint8)


class Liar(Mosaic):
    """Promises fewer codes than it gives."""

    codes = 2

    def __init__(self, options: Any) -> None:
        super().__init__(MosaicOptions())
