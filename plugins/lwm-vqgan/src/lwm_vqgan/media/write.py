"""Frames into mp4, gif or png files: as many frames in a file as are given, under another name until it is whole.

Shapes: T frames of sides H, W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lwm_core.errors import DataError, ShapeError, UnsupportedError, UsageError
from lwm_vqgan.media.container import local, told

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

Frames = Iterable[NDArray[np.uint8]]

FPS = 4.0
"""Frames a second of LWM's videos."""

_ENCODERS = {
    "libx264": {"crf": "18"},
    "libopenh264": {},
    "mpeg4": {"qmin": "2", "qmax": "3"},
}  # the first that PyAV has
_BT601, _LIMITED = 6, 1  # FFmpeg's numbers of SMPTE 170M and of the range 16 to 235, so that players need not guess


def write_media(path: Path, frames: Frames, fps: float = FPS) -> int:
    """Write ``[H,W,3]`` RGB uint8 frames to ``path`` by its suffix (.mp4, .gif, .png); returns how many.

    One frame is in memory at a time. A png holds one.

    Raises:
        UsageError: another suffix, or fps not above 0.
        DataError: there is no frame, or a file cannot be written; nothing is left of it.
        ShapeError: frames differ in size, or it is no frame; a png is given several; mp4 and odd sides.
        UnsupportedError: PyAV was built without an encoder for mp4.
    """
    writers: dict[str, Callable[[Path, Frames, float], int]] = {".mp4": _mp4, ".gif": _gif, ".png": _png}
    if path.suffix.lower() not in writers:
        raise UsageError(f"{path}: expected a name that ends with {', '.join(writers)}")
    if not 0 < fps < float("inf"):
        raise UsageError(f"fps is {fps:g}; expected a number above 0")
    checked = _checked(path, iter(frames))
    with _whole_or_nothing(path) as partial:
        return writers[path.suffix.lower()](partial, checked, fps)


def _checked(path: Path, frames: Iterator[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
    shape: tuple[int, ...] | None = None
    for frame in frames:
        if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8 or 0 in frame.shape:
            raise ShapeError(f"{path}: a frame is {frame.dtype} {list(frame.shape)}; expected uint8 [H, W, 3]")
        if shape not in (None, frame.shape):
            raise ShapeError(f"{path}: a frame is {list(frame.shape)} after others of {list(shape or ())}")
        shape = frame.shape
        yield np.ascontiguousarray(frame)
    if shape is None:
        raise DataError(f"{path}: there are no frames to write; expected at least one")


@contextmanager
def _whole_or_nothing(path: Path) -> Iterator[Path]:
    """Another name for the file until it is whole."""
    import av

    if path.is_dir():
        raise UsageError(f"{path}: is a folder; expected the name of a file")
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except (OSError, av.error.FFmpegError) as error:
        raise DataError(f"{path}: cannot be written: {told(error)}") from None
    finally:
        with suppress(OSError):
            partial.unlink()


def _mp4(path: Path, frames: Frames, fps: float) -> int:
    """H.264, or MPEG-4 part 2 where PyAV has no encoder for it; yuv420p."""
    import av

    name = next((one for one in _ENCODERS if _can_encode(one)), None)
    if name is None:
        raise UnsupportedError(f"mp4: PyAV has none of the encoders {', '.join(_ENCODERS)}; install PyAV's own wheel")
    first, frames = _peeked(frames)
    height, width = first.shape[:2]
    if height % 2 or width % 2:
        raise ShapeError(f"mp4: frames of {width}x{height}; expected even sides, for colour is kept for 2x2 pixels")
    with av.open(local(path), "w", format="mp4") as container:
        stream = _stream(container, name, width, height, "yuv420p", fps, _ENCODERS[name])
        stream.codec_context.colorspace, stream.codec_context.color_range = _BT601, _LIMITED

        def converted(frame: VideoFrame) -> VideoFrame:
            return frame.reformat(format="yuv420p", dst_colorspace=_BT601, dst_color_range=_LIMITED)

        return _muxed(container, stream, frames, converted)


def _gif(path: Path, frames: Frames, fps: float) -> int:
    """256 colours, chosen anew for each frame. GIF counts hundredths of a second."""
    import av

    first, frames = _peeked(frames)
    height, width = first.shape[:2]
    if fps > 100:
        raise UsageError(f"gif: fps is {fps:g}; expected at most 100, for GIF counts hundredths of a second")
    with av.open(local(path), "w", format="gif") as container:
        stream = _stream(container, "gif", width, height, "pal8", fps, {})
        graph = av.filter.Graph()
        source = graph.add_buffer(
            width=width, height=height, format=av.VideoFormat("rgb24"), time_base=stream.codec_context.time_base
        )
        split = graph.add("split")
        palette, paint = graph.add("palettegen", "stats_mode=single"), graph.add("paletteuse", "new=1")
        source.link_to(split)
        split.link_to(palette, 0, 0)
        split.link_to(paint, 1, 0)
        palette.link_to(paint, 0, 1)
        paint.link_to(graph.add("buffersink"))
        graph.configure()

        def painted(frame: VideoFrame) -> VideoFrame:
            graph.vpush(frame)
            return graph.vpull()

        return _muxed(container, stream, frames, painted)


def _png(path: Path, frames: Frames, fps: float) -> int:
    from PIL import Image

    first, frames = _peeked(frames)
    if len(list(islice(frames, 2))) > 1:
        raise ShapeError("png: there is more than one frame; choose one, or write an mp4 or a gif")
    Image.fromarray(first).save(path, format="png")
    return 1


def _stream(
    container: OutputContainer, name: str, width: int, height: int, pixels: str, fps: float, options: dict[str, str]
) -> VideoStream:
    rate = Fraction(str(fps)).limit_denominator(1_000_000)
    stream: Any = container.add_stream(name, rate=rate, options=dict(options))
    stream.width, stream.height, stream.pix_fmt = width, height, pixels
    stream.codec_context.time_base = 1 / rate
    return stream  # type: ignore[no-any-return]


def _muxed(
    container: OutputContainer, stream: VideoStream, frames: Frames, converted: Callable[[VideoFrame], VideoFrame]
) -> int:
    import av

    count = 0
    for pixels in frames:
        frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
        frame.pts, frame.time_base = count, stream.codec_context.time_base
        frame = converted(frame)
        frame.pts, frame.time_base = count, stream.codec_context.time_base
        container.mux(stream.encode(frame))
        count += 1
    container.mux(stream.encode(None))
    return count


def _peeked(frames: Frames) -> tuple[NDArray[np.uint8], Frames]:
    """The first frame, and all of them."""
    rest = iter(frames)
    first = next(rest)
    return first, chain([first], rest)


def _can_encode(name: str) -> bool:
    import av

    try:
        return bool(av.codec.Codec(name, "w"))
    except ValueError:  # how PyAV says that it has none
        return False
