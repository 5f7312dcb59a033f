"""Which frames of a video are taken.

Shapes: N frames of the video, T frames taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import floor

import numpy as np
from numpy.typing import NDArray

from lwm_core.errors import UsageError
from lwm_core.frames import uniform_frames


@dataclass(frozen=True)
class Sampling:
    """Every frame, or at most so many, or so many a second; one of the two at most.

    Args:
        frames: at most so many, evenly spaced from the first to the last, as LWM takes them.
        fps: so many a second: at each tick the frame that is shown then, so a slower video repeats frames.

    Raises:
        UsageError: both are given, or one is not positive.
    """

    frames: int | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        if self.frames is not None and self.fps is not None:
            raise UsageError("frames and fps are both given; expected one of them")
        if self.frames is not None and self.frames < 1:
            raise UsageError(f"frames is {self.frames}; expected at least 1")
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise UsageError(f"fps is {self.fps:g}; expected a number above 0")

    def indices(self, times: NDArray[np.int64], end: int, time_base: Fraction) -> NDArray[np.int64]:
        """``[T]`` positions in ``times``, never decreasing.

        Args:
            times: ``[N]``, when each frame is first shown, increasing, in units of ``time_base`` seconds.
            end: when the last one is taken away, in the same units.
            time_base: seconds a unit.
        """
        if self.frames is not None:
            return uniform_frames(len(times), self.frames)
        if self.fps is not None:
            return at_rate(times, end, time_base, self.fps)
        return np.arange(len(times), dtype=np.int64)


def at_rate(times: NDArray[np.int64], end: int, time_base: Fraction, fps: float) -> NDArray[np.int64]:
    """``[T]``: the frame shown at each tick k / fps from the first frame on, while the video lasts."""
    rate = Fraction(str(fps))  # 29.97 as it is written, not as binary has it
    first = int(times[0])
    length = (end - first) * time_base
    # Ticks in exact units: a tick that falls on a frame's own time shows that frame, on every machine.
    ticks = [first + floor(tick / rate / time_base) for tick in range(max(1, -floor(-length * rate)))]
    return np.searchsorted(times, np.array(ticks, np.int64), side="right") - 1
