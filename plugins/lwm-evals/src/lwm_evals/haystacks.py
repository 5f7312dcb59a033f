"""Frames as codes for the video needle suite: what is shown and what it is hidden in, encoded once and kept on disk.

Shapes: P pictures, F frames of n codes each.
"""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lwm_core.errors import DataError
from lwm_core.protocols import EvalSetup, VisionEncoder
from lwm_evals.clips import Clips, open_clips
from lwm_evals.files import write_atomically
from lwm_evals.options import VideoNeedleOptions
from lwm_evals.pictures import background, pictures

_DRAWN = 1
"""Number of the drawings: to be raised with any change of ``lwm_evals.pictures`` that changes a pixel."""


class Haystack(Protocol):
    """Frames that follow each other."""

    def __len__(self) -> int: ...

    def rows(self, start: int, stop: int) -> NDArray[np.integer]:
        """``[stop - start, n]`` codes."""
        ...


@dataclass(frozen=True)
class Drawn:
    """A haystack in memory. ``codes`` is [F, n]."""

    codes: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.codes)

    def rows(self, start: int, stop: int) -> NDArray[np.integer]:
        """See :class:`Haystack`."""
        return self.codes[start:stop]


def excerpt(haystack: Haystack, start: int, count: int) -> NDArray[np.integer]:
    """``[count, n]`` codes from frame ``start`` on, from the first again where it ends."""
    parts, at = [], start
    while count:
        stop = min(len(haystack), at + count)
        parts.append(haystack.rows(at, stop))
        count, at = count - (stop - at), 0
    return np.concatenate(parts) if parts else haystack.rows(0, 0)


def open_haystack(options: VideoNeedleOptions, setup: EvalSetup, encoder: VisionEncoder) -> Clips | None:
    """The folder of codes that is named; none where the background is to be drawn.

    Raises:
        DataError: it is no such folder, its codes are another encoder's, or all its clips are trained on.
    """
    if options.haystack is None:
        return None
    clips = open_clips("video-needle: haystack ", options.haystack, setup)
    shards = clips.shards
    made = shards.manifest.settings
    if made.checksum != encoder.checksum:
        raise DataError(
            f"video-needle: the codes of haystack {shards.folder} are of {made.encoder} {made.checksum[:12]}, but the "
            f"run's encoder is {encoder.checksum[:12]}; encode it again with that one"
        )
    if not len(clips):
        raise DataError(f"video-needle: haystack {shards.folder} holds no frame; encode at least one video into it")
    return clips


@dataclass(frozen=True)
class Codes:
    """All that clips are made of.

    Args:
        answers: of each picture.
        pictures: [P, n].
        haystack: what they are hidden in.
        fingerprint: of all of it.
    """

    answers: tuple[str, ...]
    pictures: NDArray[np.int32]
    haystack: Haystack
    fingerprint: str


def encode_once(options: VideoNeedleOptions, setup: EvalSetup, encoder: VisionEncoder, cache: Path) -> Codes:
    """Draw and encode, unless ``cache`` holds the codes of the same drawings by the same encoder.

    Raises:
        DataError: the haystack that is named cannot be used.
    """
    clips = open_haystack(options, setup, encoder)
    frames = 0 if clips is not None else options.background_frames
    said = repr((_DRAWN, setup.seed, options.asked, frames, encoder.frame_size, encoder.checksum))
    key = hashlib.sha256(said.encode()).hexdigest()
    answers, shown = pictures(options.asked, encoder.frame_size)
    kept = _read(cache, key)
    if kept is None:
        drawn = background(np.random.default_rng([setup.seed, _DRAWN]), frames, encoder.frame_size)
        codes = encoder.encode(np.concatenate([shown, drawn]))
        kept = codes[: len(shown)], codes[len(shown) :]
        _write(cache, key, *kept)
    if clips is None:
        return Codes(answers, kept[0], Drawn(kept[1]), key)
    files = "".join(shard.sha256 for shard in clips.shards.manifest.shards)
    files += "".join(map(repr, clips.names or ()))
    return Codes(answers, kept[0], clips, hashlib.sha256((key + files).encode()).hexdigest())


def _read(path: Path, key: str) -> tuple[NDArray[np.int32], NDArray[np.int32]] | None:
    """What was kept under ``key``; none where it is not there, of other drawings, or damaged: it can be made again."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            return (kept["pictures"], kept["background"]) if str(kept["key"]) == key else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write(path: Path, key: str, shown: NDArray[np.int32], drawn: NDArray[np.int32]) -> None:
    buffer = BytesIO()
    np.savez_compressed(buffer, key=np.array(key), pictures=shown, background=drawn)
    write_atomically(path, buffer.getvalue())
