"""Frames of pictures and videos, scaled and cut to a square.

Shapes: T frames [T,H,W,3] uint8, H = W = side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, ImageSequence

from lwm_core.errors import DataError, LwmError
from lwm_core.frames import uniform_frames

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
VIDEOS = frozenset({".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v"})


@contextmanager
def told_by(suite: str) -> Iterator[None]:
    """What is wrong with a file is told with the suite's name."""
    try:
        yield
    except LwmError as error:
        error.args = (f"{suite}: {error}",)
        raise


def find_files(path: Path) -> list[Path]:
    """The pictures and videos at ``path``: itself, or those in a folder and below, by name.

    Raises:
        DataError: there is none, or a video cannot be read here.
    """
    known = PICTURES | VIDEOS
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in known)
    else:
        files = [path] if path.is_file() and path.suffix.lower() in known else []
    if not files:
        raise DataError(
            f"{path}: there is no picture or video; expected a file or folder of {', '.join(sorted(known))}"
        )
    video = next((file for file in files if file.suffix.lower() in VIDEOS), None)
    if video is not None and find_spec("av") is None:
        raise DataError(f"{video}: videos are read with PyAV, which is not installed: pip install 'lwm-evals[video]'")
    return files


def read_frames(path: Path, side: int, most: int) -> tuple[NDArray[np.uint8], list[str]]:
    """At most ``most`` frames, evenly spaced over all there are, and what each is called; see :func:`frames_at`."""
    return frames_at(path, side, lambda count: uniform_frames(count, most).tolist())


def frames_at(path: Path, side: int, choose: Callable[[int], Sequence[int]]) -> tuple[NDArray[np.uint8], list[str]]:
    """The frames whose numbers ``choose`` gives for how many there are, and what each is called.

    The shortest side is scaled to ``side`` and the middle is cut out.

    Raises:
        DataError: there is none, or a file is damaged.
    """
    files = find_files(path)
    counts = [_count(file) for file in files]
    wanted = set(choose(sum(counts)))
    made, names, first = [], [], 0
    for file, count in zip(files, counts, strict=True):
        if wanted.intersection(range(first, first + count)):
            for number, frame in enumerate(_frames(file)):
                if first + number in wanted:
                    made.append(square(frame, side, file))
                    names.append(file.name if count == 1 else f"{file.name} {number}")
        first += count
    if not made:
        raise DataError(f"{path}: holds no frame")
    return np.stack(made), names


def square(frame: Image.Image, side: int, file: Path) -> NDArray[np.uint8]:
    """``[side, side, 3]``: the shortest side scaled, the middle cut out; an alpha channel is dropped.

    Raises:
        DataError: it has more than eight bits a channel.
    """
    if frame.mode.startswith(("I", "F")):
        raise DataError(f"{file}: has more than eight bits a channel ({frame.mode}); convert it to eight first")
    width, height = frame.size
    scale = side / min(width, height)
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    pixels = np.asarray(frame.convert("RGB").resize(size, Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[top : top + side, left : left + side]


def _count(file: Path) -> int:
    """Frames of a file: of a video by decoding it, for what a container says of that is not always so."""
    if file.suffix.lower() in VIDEOS:
        return sum(1 for _ in _video_frames(file))
    try:
        with Image.open(file) as picture:
            return int(getattr(picture, "n_frames", 1))
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{file}: is no picture that can be read: {error}") from None


def _frames(file: Path) -> Iterator[Image.Image]:
    """The frames of a file, upright, one at a time."""
    if file.suffix.lower() in VIDEOS:
        yield from _video_frames(file)
        return
    try:
        with Image.open(file) as picture:
            for frame in ImageSequence.Iterator(picture):
                yield ImageOps.exif_transpose(frame).copy()
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{file}: is no picture that can be read: {error}") from None


def _video_frames(file: Path) -> Iterator[Image.Image]:
    import av

    try:
        with av.open(str(file)) as container:
            for frame in container.decode(video=0):
                yield frame.to_image()
    except (av.error.FFmpegError, IndexError) as error:
        raise DataError(f"{file}: is no video that can be read: {error}") from None
