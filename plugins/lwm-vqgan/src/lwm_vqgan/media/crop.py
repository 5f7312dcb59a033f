"""A frame as the encoder takes it: the shortest side scaled to the frame's size, and the middle of it.

Shapes: H, W of the frame; S the encoder's frame size.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lwm_core.errors import ShapeError


def preprocess(frame: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """``[H,W,3]`` → ``[S,S,3]``, RGB uint8: shortest side → S, then the centre, as LWM does (its ``vision_chat``).

    Scaled by Pillow's bicubic filter, which is widened when it shrinks (so nothing aliases). Only the square that is
    kept is computed; its borders see the pixels beyond it, as if all had been scaled first.

    Raises:
        ShapeError: it is no RGB picture in bytes, or has no pixels.
    """
    from PIL import Image

    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8 or 0 in frame.shape:
        raise ShapeError(f"a frame is {frame.dtype} {list(frame.shape)}; expected uint8 [H, W, 3] with pixels")
    height, width = frame.shape[:2]
    if height == width == size:
        return frame
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    picture = Image.fromarray(np.ascontiguousarray(frame))
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box))
