"""What a media plugin gives: files of pictures and video to frames and back.

Shapes: T frames of S × S or H × W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


class MediaClip(Protocol):
    """The frames that are taken of a file.

    Attributes:
        path: the file.
        still: whether it is a picture; one of video else.
        length: T, frames that are taken.
    """

    @property
    def path(self) -> Path:
        """See above."""
        ...

    @property
    def still(self) -> bool:
        """See above."""
        ...

    @property
    def length(self) -> int:
        """See above."""
        ...

    def squares(self, size: int) -> Iterator[NDArray[np.uint8]]:
        """``[S,S,3]`` RGB for S = ``size``, upright, one after the other: shortest side scaled to S, then the centre.

        Raises:
            DataError: the file is damaged; the line says where.
        """
        ...


@runtime_checkable
class Media(Protocol):
    """Files of pictures and video.

    Attributes:
        stills: suffixes of the pictures that it writes, in lower case (``.png``).
        videos: suffixes of the videos that it writes.
    """

    stills: tuple[str, ...]
    videos: tuple[str, ...]

    def open(self, path: Path, *, frames: int | None = None, fps: float | None = None) -> MediaClip:
        """A file, looked through but not decoded yet.

        Args:
            path: a picture or a video.
            frames: at most so many of a video, evenly spaced; every one if none.
            fps: so many a second instead.

        Raises:
            DataError: there is no such file, or it is no picture or video.
            UsageError: both are given, or one is not above 0.
        """
        ...

    def write(self, path: Path, frames: Iterable[NDArray[np.uint8]], fps: float) -> int:
        """Write ``[H,W,3]`` RGB uint8 frames, by the suffix of ``path``; returns how many. It is whole or not there.

        Raises:
            DataError: it cannot be written.
            UsageError: another suffix, or fps not above 0.
            ShapeError: the frames do not fit each other or the format.
        """
        ...
