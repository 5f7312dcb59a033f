"""What a video holds: when each frame is shown, and where decoding can begin.

Told by its packets, undecoded, where they agree with what the first of them decode to; else by decoding once.

Shapes: N frames, K places where decoding can begin.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lwm_core.errors import DataError
from lwm_vqgan.media.container import opened

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

_USUAL_RATE = Fraction(25)  # frames a second, of a bare stream that does not say
_TRIED = 16  # frames that are decoded to see whether packets tell the truth; more than a decoder reorders
_NONE = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Scan:
    """A video's frames.

    Args:
        times: ``[N]`` int64, when each is first shown, increasing, in units of ``time_base``. Eight bytes a frame are
            all that is kept of a video.
        end: when the last is taken away.
        time_base: seconds a unit.
        jumps: ``[K]`` int64, times of the keyframes that seeking reaches exactly; empty: decode from the start alone.
        rate: frames a second on average.
        timed: whether decoded frames carry these times; else they are counted.
    """

    times: NDArray[np.int64]
    end: int
    time_base: Fraction
    jumps: NDArray[np.int64]
    rate: Fraction
    timed: bool


def scan(path: Path) -> Scan:
    """Find a video's frames.

    Raises:
        DataError: it cannot be read, is cut off, or holds no frame.
    """
    with opened(path) as (container, stream):
        rate = Fraction(stream.average_rate or stream.guessed_rate or _USUAL_RATE)
        base = None if stream.time_base is None else Fraction(stream.time_base)
        times, keys, length = _packets(path, container, stream)
        jumps = _NONE if times is None or base is None else _jumps(container, stream, keys)
    if base is not None and times is not None and _first(path) == times[:_TRIED].tolist():
        return Scan(times, int(times[-1]) + (length or _units(rate, base)), base, jumps, rate, True)
    shown = _all_decoded(path)
    if base is not None and None not in shown:
        decoded = np.unique(np.array(shown, np.int64))
        if len(decoded) == len(shown):
            return Scan(decoded, int(decoded[-1]) + _units(rate, base), base, _NONE, rate, True)
    return Scan(np.arange(len(shown), dtype=np.int64), len(shown), 1 / rate, _NONE, rate, False)


def _units(rate: Fraction, base: Fraction) -> int:
    """How long a frame is shown on average, in units of ``base``."""
    return max(1, round(1 / rate / base))


def _packets(
    path: Path, container: InputContainer, stream: VideoStream
) -> tuple[NDArray[np.int64] | None, NDArray[np.int64], int]:
    """Times of the packets in order (none where they do not tell), those of keyframes, and how long the last one lasts.

    Raises:
        DataError: there are none, or fewer than the file's index has.
    """
    times, keys = array("q"), array("q")
    count, timed, last = 0, True, (-(2**62), 0)  # last: when the last frame is shown, and how long
    for packet in container.demux(stream):
        if not packet.size:
            continue
        count += 1
        if packet.pts is None:
            timed = False
        elif not packet.is_discard:  # else it lies before the place where an edited file begins
            times.append(packet.pts)
            last = max(last, (packet.pts, packet.duration or 0))
            if packet.is_keyframe:
                keys.append(packet.pts)
    if not count:
        raise DataError(f"{path}: holds no frames; expected at least one")
    if "mp4" in container.format.name and count < stream.frames:
        raise DataError(f"{path}: is cut off: {count} of its {stream.frames} frames are there")
    order = np.unique(np.frombuffer(times, np.int64)) if times else _NONE
    whole = timed and 0 < len(order) == len(times)
    return (order if whole else None), (np.unique(np.frombuffer(keys, np.int64)) if keys else _NONE), last[1]


def _jumps(container: InputContainer, stream: VideoStream, keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """``keys``, or none of them where the format does not seek to them exactly (MPEG-TS, GIF); three are tried."""
    import av

    for at in sorted({min(1, len(keys) - 1), len(keys) // 2, len(keys) - 1}) if len(keys) else ():
        try:
            container.seek(int(keys[at]), stream=stream)
            landed = next((packet.pts for packet in container.demux(stream) if packet.size), None)
        except av.error.FFmpegError:
            return _NONE
        if landed != keys[at]:
            return _NONE
    return keys


def _first(path: Path) -> list[int | None]:
    """The times of the first frames, decoded."""
    with opened(path) as (container, stream):
        return [frame.pts for frame in islice(container.decode(stream), _TRIED)]


def _all_decoded(path: Path) -> list[int | None]:
    """The times of all frames, decoded.

    Raises:
        DataError: there are none.
    """
    with opened(path) as (container, stream):
        shown: list[int | None] = [frame.pts for frame in container.decode(stream)]
    if not shown:
        raise DataError(f"{path}: none of its frames decodes; it is damaged, or not whole")
    return shown
