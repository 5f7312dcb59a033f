"""What an encoder plugin gives: frames to codes and back; and what its factory may need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@runtime_checkable
class VisionEncoder(Protocol):
    """Frames to codes and back, NumPy in and out.

    Attributes:
        codes: entries of the codebook; every code is below it.
        frame_size: sides H = W of a frame, in pixels.
        codes_per_frame: h·w, the codes of one frame (LWM: 256).
        checksum: SHA-256, in hex, of all that decides on the codes (the weights and their shape): codes of one encoder
            are read by another only where this is the same.
    """

    codes: int
    frame_size: int
    codes_per_frame: int

    @property
    def checksum(self) -> str:
        """See above; a property here, so that a plugin may work it out when it is asked for."""
        ...

    def encode(self, frames: NDArray[np.uint8]) -> NDArray[np.int32]:
        """``[T,H,W,3]`` uint8 → ``[T, h·w]`` int32."""
        ...

    def decode(self, codes: NDArray[np.int32]) -> NDArray[np.uint8]:
        """``[T, h·w]`` int32 → ``[T,H,W,3]`` uint8."""
        ...


@dataclass(frozen=True)
class EncoderContext:
    """What an encoder factory may need.

    Args:
        framework: the trainer's, which an encoder that knows several follows; none where there is no trainer.
        base_dir: where relative paths start.
    """

    framework: Literal["jax", "torch"] | None = None
    base_dir: Path = Path(".")
