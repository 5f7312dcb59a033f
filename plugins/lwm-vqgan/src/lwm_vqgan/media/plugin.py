"""The media plugin ``files``: what the core's verbs read and write pictures and video with.

Shapes: S the sides of a frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lwm_vqgan.media.crop import preprocess
from lwm_vqgan.media.read import Clip, open_clip
from lwm_vqgan.media.sampling import Sampling
from lwm_vqgan.media.write import write_media


@dataclass(frozen=True)
class FileClip:
    """See :class:`lwm_core.protocols.MediaClip`."""

    clip: Clip

    @property
    def path(self) -> Path:
        """The file."""
        return self.clip.path

    @property
    def still(self) -> bool:
        """Whether it is a picture."""
        return self.clip.scan is None

    @property
    def length(self) -> int:
        """Frames that are taken."""
        return self.clip.length

    def squares(self, size: int) -> Iterator[NDArray[np.uint8]]:
        """``[S,S,3]`` RGB, as :func:`~lwm_vqgan.media.crop.preprocess` cuts them."""
        return (preprocess(frame.pixels, size) for frame in self.clip.frames())


class Files:
    """See :class:`lwm_core.protocols.Media`."""

    stills = (".png",)
    videos = (".mp4", ".gif")

    def open(self, path: Path, *, frames: int | None = None, fps: float | None = None) -> FileClip:
        """See :func:`~lwm_vqgan.media.read.open_clip`."""
        return FileClip(open_clip(path, Sampling(frames, fps)))

    def write(self, path: Path, frames: Iterable[NDArray[np.uint8]], fps: float) -> int:
        """See :func:`~lwm_vqgan.media.write.write_media`."""
        return write_media(path, frames, fps)


def files(options: object) -> Files:
    """The factory of ``lwm.media.v1``; there are no options."""
    return Files()
