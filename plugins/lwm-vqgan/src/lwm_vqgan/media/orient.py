"""A decoded frame turned as its display matrix says: phones film sideways and tell it there.

Shapes: H, W of the frame as it is stored.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lwm_core.errors import DataError


def upright(pixels: NDArray[np.uint8], matrix: NDArray[np.int32]) -> NDArray[np.uint8]:
    """``[H,W,3]`` turned and mirrored, ``[H,W,3]`` or ``[W,H,3]``.

    Args:
        matrix: ``[3,3]`` of the MP4 file format (ISO/IEC 14496-12, section 6.2.2): a pixel (x, y) is shown at
            ``(a x + c y, b x + d y)`` with ``a, b`` and ``c, d`` at the beginning of the first two rows, up to a shift.

    Raises:
        DataError: the angle is no multiple of 90°.
    """
    (a, b), (c, d) = np.sign(matrix[:2, :2]).tolist()
    if (b, c) == (0, 0) and a and d:
        return pixels[::d, ::a]
    if (a, d) == (0, 0) and b and c:
        return pixels.transpose(1, 0, 2)[::b, ::c]
    raise DataError("it is turned by an angle that is no multiple of 90°; turn it upright first")
