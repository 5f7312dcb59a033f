"""The frames of a picture or a video, one after the other, each decoded only when it is asked for.

Shapes: H, W of a frame; T frames taken.

A video is decoded in runs. A run begins at a keyframe that seeking reaches exactly, and covers as many of the frames
that are taken as lie near each other. Which runs there are depends on the file and the sampling alone, so that reading
that starts in the middle decodes as reading from the beginning does, to the bit.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lwm_core.errors import DataError
from lwm_vqgan.media.container import check_plain, opened, told
from lwm_vqgan.media.files import is_picture
from lwm_vqgan.media.orient import upright
from lwm_vqgan.media.sampling import Sampling
from lwm_vqgan.media.scan import Scan, scan

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

_LONGEST_RUN = 60  # seconds of video that are decoded again at most when reading starts in the middle
_WORTH_A_JUMP = 1  # seconds of video that a jump must save, for it throws the decoder's state away


class Frame(NamedTuple):
    """A frame that was taken.

    ``time`` is in seconds after the video's first frame, ``pixels`` are ``[H,W,3]`` RGB uint8, upright.
    """

    time: float
    pixels: NDArray[np.uint8]


class Run(NamedTuple):
    """Frames ``[start, stop)`` of those taken, decoded from the keyframe at ``jump`` (none: from the file's start)."""

    jump: int | None
    start: int
    stop: int


@dataclass(frozen=True)
class Clip:
    """A picture, or the frames that are taken of a video.

    Args:
        path: the file.
        length: frames T that are taken.
        fps: frames a second of those taken; none where they were taken by number, and for a picture.
        indices: ``[T]`` which of the video's frames they are; none for a picture.
        scan: the video's frames; none for a picture.
    """

    path: Path
    length: int
    fps: float | None
    indices: NDArray[np.int64] | None = None
    scan: Scan | None = None

    def frames(self, start: int = 0) -> Generator[Frame, None, None]:
        """The frames that are taken, without the first ``start``.

        Raises:
            DataError: the file is damaged; the line says where.
        """
        if self.scan is not None and self.indices is not None:
            yield from _taken(self.path, self.scan, self.indices, start)
        elif start == 0:
            yield Frame(0.0, _picture(self.path))


def open_clip(path: Path, sampling: Sampling | None = None) -> Clip:
    """What ``sampling`` takes of a file (default: every frame). A video's packets are read through once.

    Raises:
        DataError: there is no such file, or it is no picture or video, or holds no frame.
    """
    sampling = sampling or Sampling()
    if is_picture(path):
        return Clip(path, 1, None)
    index = scan(path)
    indices = sampling.indices(index.times, index.end, index.time_base)
    every = sampling.fps is None and len(indices) == len(index.times)
    return Clip(path, len(indices), sampling.fps or (float(index.rate) if every else None), indices, index)


def runs(index: Scan, indices: NDArray[np.int64]) -> list[Run]:
    """The runs in which the frames ``indices`` are decoded: a pure function of its arguments.

    A jump is made where it saves a second of decoding, and where a run has become long. Frames shown after a keyframe
    do not depend on those before it.
    """
    wanted = index.times[indices]
    keys = np.searchsorted(index.jumps, wanted, side="right") - 1
    found: list[Run] = []
    start, jump, begun = 0, None, int(index.times[0])
    for at in np.flatnonzero(keys >= 0).tolist():
        key = int(index.jumps[keys[at]])
        done = int(wanted[at - 1]) if at else begun
        saved, lasted = (key - done) * index.time_base, (key - begun) * index.time_base
        if key > done and (saved > _WORTH_A_JUMP or lasted > _LONGEST_RUN):
            if at:
                found.append(Run(jump, start, at))
            start, jump, begun = at, key, key
    return [*found, Run(jump, start, len(wanted))]


def _taken(path: Path, index: Scan, indices: NDArray[np.int64], start: int) -> Iterator[Frame]:
    """The frames ``indices`` of a video, from number ``start`` of them on.

    Raises:
        DataError: one of them does not decode, or only with damage.
    """
    wanted = index.times[indices]
    origin = int(index.times[0])
    turned = _Upright(path)

    def seconds(time: int) -> float:
        return float((time - origin) * index.time_base)

    with opened(path) as (container, stream):
        for run in runs(index, indices):
            if run.stop <= start:
                continue
            at = run.start
            for time, frame in _decoded(path, container, stream, index, run.jump):
                leading = (
                    run.jump is not None and time < run.jump
                )  # shown before the keyframe, and based on what is not read
                if frame.is_corrupt and not leading:
                    raise DataError(f"{path}: is damaged at {seconds(time):.2f} s: a frame decodes only in part")
                if time > wanted[at]:
                    break
                while at < run.stop and wanted[at] == time:
                    if at >= start:
                        yield Frame(seconds(time), turned.pixels(frame))
                    at += 1
                if at == run.stop:
                    break
            if at < run.stop:
                missed = seconds(int(wanted[at]))
                raise DataError(f"{path}: is damaged at {missed:.2f} s: a frame is missing")


def _decoded(
    path: Path, container: InputContainer, stream: VideoStream, index: Scan, jump: int | None
) -> Iterator[tuple[int, VideoFrame]]:
    """Decoded frames with their times, from the keyframe at ``jump`` on.

    Raises:
        DataError: one does not decode at all.
    """
    import av

    if jump is not None:
        container.seek(jump, stream=stream)
    frames = container.decode(stream)
    time = int(index.times[0]) if jump is None else jump
    for count in itertools.count():
        try:
            frame = next(frames, None)
        except av.error.FFmpegError as error:
            near = float((time - int(index.times[0])) * index.time_base)
            raise DataError(f"{path}: is damaged at {near:.2f} s, or soon after it: {told(error)}") from None
        if frame is None:
            return
        if not index.timed:
            time = count
        elif frame.pts is not None:
            time = frame.pts
        else:
            continue
        yield time, frame


class _Upright:
    """Frames of a video as upright pixels.

    A frame that was asked for its side data holds itself in a circle and waits, with its pixels, for the garbage
    collector. So the display matrix is read once, and again only when the frame's angle is another.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._angle: int | None = None
        self._matrix: NDArray[np.int32] | None = None

    def pixels(self, frame: VideoFrame) -> NDArray[np.uint8]:
        """``[H,W,3]`` RGB; more than 8 bits are rounded, an alpha channel is dropped.

        Raises:
            DataError: it is turned by an angle that is no multiple of 90°.
        """
        found: NDArray[np.uint8] = np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
        if frame.rotation != self._angle:
            data: Any = frame.side_data.get("DISPLAYMATRIX")
            self._angle = frame.rotation
            self._matrix = None if data is None else np.frombuffer(bytes(data), np.int32).reshape(3, 3)
        if self._matrix is None:
            return found
        try:
            return upright(found, self._matrix)
        except DataError as error:
            raise DataError(f"{self._path}: {error}") from None


def _picture(path: Path) -> NDArray[np.uint8]:
    """``[H,W,3]`` RGB of a still picture, upright as its EXIF has it; of several pages the first, without its alpha.

    Raises:
        DataError: it cannot be read.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    check_plain(path)
    # What Pillow notes of a file that it can read, or is about to refuse, is not for the reader of the command.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        with Image.open(path) as picture:
            if picture.mode.startswith("I;16"):  # Pillow's own conversion would cut these off at 255
                grey = np.asarray(ImageOps.exif_transpose(picture), np.uint32)
                return np.repeat(((grey + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
            if picture.mode in ("I", "F"):
                raise DataError(f"{path}: its pixels are {picture.mode!r} numbers without a known range; convert it")
            return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    except UnidentifiedImageError:
        raise DataError(f"{path}: is no picture that can be read; expected what its name says") from None
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read: {told(error)}; the file is damaged or cut off") from None
