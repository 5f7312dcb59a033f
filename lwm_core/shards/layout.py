"""What lies in a folder of codes.

OUT/manifest.json        settings, counts, size and SHA-256 of every other file; replaced at once, and last
OUT/videos.jsonl         a line a picture or video, in order: name, bytes, first row, frames, fps, what broke
OUT/00000.safetensors    rows 0 to shard_frames - 1 of all videos one after the other: ``codes`` [rows, L] and ``times``
                         [rows] float64, seconds after each video's first frame

While a folder is being filled its last shard is ``NNNNN-ROWS.safetensors``, a new file each time. The same sources and
settings give the same bytes, however often the filling was cut off.

Shapes: L codes a frame.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lwm_core.errors import DataError

MANIFEST, VIDEOS = "manifest.json", "videos.jsonl"
FORMAT = 1


def code_dtype(codes: int) -> np.dtype[Any]:
    """What the entries of a codebook of so many are kept as: uint16 as long as they fit."""
    return np.dtype("<u2" if codes <= 2**16 else "<i4")


@dataclass(frozen=True)
class Settings:
    """All that decides on the codes, besides the sources; a folder is only gone on with under the same.

    Args:
        encoder: the encoder plugin as ``dist:name``.
        checksum: of its weights, as it tells.
        options: its options.
        codes: entries of its codebook.
        frame_size: sides of its frames in pixels.
        frames, fps: the sampling.
        batch: frames that are encoded together, for on some devices a code may depend on its neighbours.
        shard_frames: rows of a whole shard, a multiple of ``batch``.
    """

    encoder: str
    checksum: str
    options: dict[str, Any]
    codes: int
    frame_size: int
    frames: int | None
    fps: float | None
    batch: int
    shard_frames: int

    def difference(self, other: Settings) -> str:
        """The first setting that differs, in words; empty where none does."""
        ours, theirs = asdict(self), asdict(other)
        return next((f"{key} {ours[key]!r}, now {theirs[key]!r}" for key in ours if ours[key] != theirs[key]), "")


@dataclass(frozen=True)
class Video:
    """A picture or video whose codes are in the folder.

    Args:
        name: its path below the folder it came from, with ``/``, or its file name.
        size: bytes of its file.
        start: its first row of all.
        frames: its rows T.
        fps: frames a second of those taken; none where they were taken by number, and for a picture.
        broken: what was wrong with it; its frames before that are kept. Empty for a good one.
    """

    name: str
    size: int
    start: int
    frames: int
    fps: float | None
    broken: str = ""


@dataclass(frozen=True)
class Shard:
    """A file of rows, with its size in bytes and SHA-256."""

    file: str
    frames: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Current:
    """The video that was being encoded when the manifest was written, with its rows so far."""

    name: str
    size: int
    frames: int


@dataclass(frozen=True)
class Manifest:
    """See the module.

    Args:
        settings: how the codes were made.
        complete: whether all sources are in.
        tokens_per_frame: L; 0 before the first row.
        frames: rows in all.
        videos: lines of ``videos.jsonl``.
        videos_size, videos_sha256: of ``videos.jsonl``; what lies beyond the size was never committed.
        current: the video that is not through.
        shards: in order.
    """

    settings: Settings
    complete: bool
    tokens_per_frame: int
    frames: int
    videos: int
    videos_size: int
    videos_sha256: str
    current: Current | None
    shards: tuple[Shard, ...]

    def text(self) -> str:
        """The manifest as JSON."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest in ``folder``.

    Raises:
        DataError: there is none, or it is of another format or damaged.
    """
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            raise DataError(f"{path}: is of another format; this version reads {FORMAT}")
        current = values.pop("current")
        return Manifest(
            settings=Settings(**values.pop("settings")),
            current=None if current is None else Current(**current),
            shards=tuple(Shard(**shard) for shard in values.pop("shards")),
            **values,
        )
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{folder}: is no folder of codes: there is no {MANIFEST} in it; lwm encode writes one"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read: {error!r}") from None


def read_videos(folder: Path, manifest: Manifest) -> list[Video]:
    """The committed lines of ``videos.jsonl``.

    Raises:
        DataError: it is missing or shorter than its manifest says, or damaged.
    """
    path = folder / VIDEOS
    try:
        with path.open("rb") as file:
            data = file.read(manifest.videos_size)
        if len(data) < manifest.videos_size:
            raise DataError(f"{path}: has {len(data)} bytes; its manifest says {manifest.videos_size}")
        return [Video(**json.loads(line)) for line in data.splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
