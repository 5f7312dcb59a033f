"""Clips of a folder of codes that may be evaluated on: all of them, or those that training leaves out.

Shapes: F frames of all clips, n codes of a frame.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lwm_core.errors import DataError, LwmError
from lwm_core.packaged import locate
from lwm_core.protocols import EvalSetup
from lwm_core.shards import Shards, Video, open_shards


class Clips:
    """Some clips of a folder, as if it held no others.

    Args:
        shards: the folder.
        names: of the clips; None for all.
    """

    def __init__(self, shards: Shards, names: Collection[str] | None = None) -> None:
        self.shards = shards
        self.names = None if names is None else tuple(sorted(names))
        chosen = None if names is None else frozenset(names)
        self._numbers = [i for i, one in enumerate(shards.videos) if chosen is None or one.name in chosen]
        self.videos: list[Video] = [shards.videos[i] for i in self._numbers]
        self._ends = np.cumsum([video.frames for video in self.videos], dtype=np.int64)

    def __len__(self) -> int:
        """F."""
        return int(self._ends[-1]) if self.videos else 0

    def codes(self, clip: int, start: int, stop: int) -> NDArray[np.integer]:
        """``[stop - start, n]`` codes of a clip by its number among these."""
        return self.shards.codes(self._numbers[clip], start, stop)

    def rows(self, start: int, stop: int) -> NDArray[np.integer]:
        """``[stop - start, n]`` codes by their place among all F frames."""
        if self.names is None:
            return self.shards.rows(start, stop)
        parts = [self.shards.rows(0, 0)]
        clip = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            video, end = self.videos[clip], int(self._ends[clip])
            offset, until = video.start + video.frames - end, min(stop, end)
            parts.append(self.shards.rows(offset + start, offset + until))
            start, clip = until, clip + 1
        return np.concatenate(parts)


def open_clips(who: str, path: str | None, setup: EvalSetup) -> Clips:
    """The clips of a folder by ``lwm encode`` that are not trained on.

    Args:
        who: what an error begins with.
        path: the folder; None for the one that the data source holds clips out of.
        setup: the run's.

    Raises:
        DataError: there is no such folder, or it is trained on and nothing of it is held out; without a path, clips are
            held out of none or of several.
    """
    try:
        folder = _only_held_out(setup) if path is None else locate(path, setup.base_dir)
        shards = open_shards(folder)
    except LwmError as error:
        raise DataError(f"{who}{error}") from None
    names = setup.held_out_clips.get(folder.resolve())
    if names is not None and not names:
        raise DataError(
            f"{who}{folder} is trained on and none of its clips is held out; set held_out in its data source, or name "
            "a folder of other clips"
        )
    return Clips(shards, names)


def _only_held_out(setup: EvalSetup) -> Path:
    found = [folder for folder, names in setup.held_out_clips.items() if names]
    if not found:
        raise DataError("no data source holds clips out; set held_out in a vision source, or path to a folder of codes")
    if len(found) > 1:
        raise DataError(f"clips are held out of {' and '.join(map(str, found))}; set path to one of them")
    return found[0]
