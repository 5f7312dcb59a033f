"""A vision encoder of one code a frame: its mean brightness. Shapes: T frames of 16 × 16 pixels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lwm_core.protocols import EncoderContext
from lwm_standin.options import PatchesOptions


class Patches:
    """See the module; ``context`` is kept, so that tests can see what was told."""

    frame_size = 16
    codes_per_frame = 1
    checksum = "0" * 64

    def __init__(self, options: PatchesOptions, context: EncoderContext) -> None:
        self.codes, self.context = options.codes, context

    def encode(self, frames: NDArray[np.uint8]) -> NDArray[np.int32]:
        """[T,16,16,3] → [T,1]."""
        return (frames.mean(axis=(1, 2, 3), keepdims=True)[:, 0, 0] * self.codes / 256).astype(np.int32)

    def decode(self, codes: NDArray[np.int32]) -> NDArray[np.uint8]:
        """[T,1] → [T,16,16,3]."""
        level = (codes * 256 // self.codes).astype(np.uint8)
        return np.broadcast_to(level[:, None, None, :], (len(codes), 16, 16, 3)).copy()
