"""Codes read back at any (video, frame): shards are mapped, not loaded, and checked when asked.

Shapes: n rows of L codes, T frames of a video.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lwm_core.errors import DataError, UsageError
from lwm_core.shards.layout import VIDEOS, Manifest, Shard, Video, code_dtype, read_manifest, read_videos

_CODES = {"U16": "<u2", "I32": "<i4", "F64": "<f8"}  # safetensors' names
_MOST_NAMED = 4


class Shards:
    """A folder of codes.

    Args:
        folder: the folder.
        manifest: its manifest.
        videos: its pictures and videos, in order.

    Raises:
        DataError: a shard is missing or not whole.
    """

    def __init__(self, folder: Path, manifest: Manifest, videos: list[Video]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.videos = videos
        self._firsts = np.cumsum([0, *(shard.frames for shard in manifest.shards)])
        self._maps: dict[int, tuple[NDArray[Any], NDArray[np.float64]]] = {}
        if self._firsts[-1] != manifest.frames:
            raise DataError(f"{folder}: its shards hold {self._firsts[-1]} rows; its manifest says {manifest.frames}")
        for shard in manifest.shards:
            _check_size(folder, shard)

    def __len__(self) -> int:
        """Frames of all videos."""
        return self.manifest.frames

    def __getstate__(self) -> dict[str, Any]:
        """For another process: what is mapped here is mapped there anew."""
        return {**self.__dict__, "_maps": {}}

    def video(self, which: int | str) -> Video:
        """A video by its number, or by its name.

        Raises:
            UsageError: there is none.
        """
        if isinstance(which, int):
            if 0 <= which < len(self.videos):
                return self.videos[which]
            raise UsageError(f"{self.folder}: there is no video {which}; expected 0 to {len(self.videos) - 1}")
        found = next((video for video in self.videos if video.name == which), None)
        if found is None:
            names = [video.name for video in self.videos[:_MOST_NAMED]]
            more = ", ..." if len(self.videos) > _MOST_NAMED else ""
            raise UsageError(f"{self.folder}: there is no video {which!r}; expected one of {', '.join(names)}{more}")
        return found

    def codes(self, which: int | str, start: int = 0, stop: int | None = None) -> NDArray[np.integer]:
        """``[n, L]`` codes of frames ``[start, stop)`` of a video (default: all T); a view of the file where possible.

        Raises:
            UsageError: there is no such video, or no such frame.
            DataError: a shard is damaged.
        """
        return self._read(*self._rows(self.video(which), start, stop), 0)

    def times(self, which: int | str, start: int = 0, stop: int | None = None) -> NDArray[np.float64]:
        """``[n]`` seconds after the video's first frame, for frames ``[start, stop)``; see :meth:`codes`."""
        return self._read(*self._rows(self.video(which), start, stop), 1)

    def rows(self, start: int, stop: int) -> NDArray[np.integer]:
        """``[stop - start, L]`` codes by their place among all rows, whatever videos they are of.

        Raises:
            UsageError: there are no such rows.
        """
        if not 0 <= start <= stop <= len(self):
            raise UsageError(f"{self.folder}: there are no rows {start} to {stop}; expected 0 to {len(self)}")
        return self._read(start, stop, 0)

    def verify(self) -> None:
        """Hold every file against its SHA-256.

        Raises:
            DataError: one was changed, with its name.
        """
        for shard in self.manifest.shards:
            _check_sum(self.folder / shard.file, shard.sha256, None)
        _check_sum(self.folder / VIDEOS, self.manifest.videos_sha256, self.manifest.videos_size)

    def _rows(self, video: Video, start: int, stop: int | None) -> tuple[int, int]:
        stop = video.frames if stop is None else stop
        if not 0 <= start <= stop <= video.frames:
            raise UsageError(f"{video.name}: there are no frames {start} to {stop}; expected 0 to {video.frames}")
        return video.start + start, video.start + stop

    def _read(self, start: int, stop: int, part: int) -> NDArray[Any]:
        if start == stop:
            width = (0, self.manifest.tokens_per_frame)
            return np.zeros(0, "<f8") if part else np.zeros(width, code_dtype(self.manifest.settings.codes))
        pieces = []
        at = int(np.searchsorted(self._firsts, start, side="right")) - 1
        while start < stop:
            first, end = int(self._firsts[at]), int(self._firsts[at + 1])
            if at not in self._maps:
                self._maps[at] = map_shard(self.folder, self.manifest.shards[at], self.manifest)
            pieces.append(self._maps[at][part][start - first : min(stop, end) - first])
            start, at = end, at + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def open_shards(folder: Path, *, incomplete: bool = False, verify: bool = False) -> Shards:
    """A folder of codes, opened for reading.

    Args:
        folder: what ``lwm encode`` wrote.
        incomplete: whether one that is still being filled will do; its last video may be there in part.
        verify: hold every file against its SHA-256 first.

    Raises:
        DataError: it is no such folder, is not complete, or is damaged.
    """
    manifest = read_manifest(folder)
    if not manifest.complete and not incomplete:
        raise DataError(f"{folder}: is not complete: {manifest.frames} frames so far; go on with the same lwm encode")
    videos = read_videos(folder, manifest)
    if manifest.current is not None:
        start = sum(video.frames for video in videos)
        videos.append(Video(manifest.current.name, manifest.current.size, start, manifest.current.frames, None))
    shards = Shards(folder, manifest, videos)
    if verify:
        shards.verify()
    return shards


def map_shard(
    folder: Path, shard: Shard, manifest: Manifest, *, verify: bool = False
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """``[n, L]`` codes and ``[n]`` times of a shard, mapped.

    Raises:
        DataError: it is missing, damaged, or not what the manifest says.
    """
    path = folder / shard.file
    _check_size(folder, shard)
    if verify:
        _check_sum(path, shard.sha256, None)
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        found = {
            name: np.memmap(
                path, _CODES[entry["dtype"]], "r", 8 + size + entry["data_offsets"][0], tuple(entry["shape"])
            )
            for name, entry in header.items()
        }
        codes, times = found["codes"], found["times"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, MemoryError) as error:
        raise DataError(f"{path}: cannot be read: {error!r}; encode it again") from None
    expected = (shard.frames, manifest.tokens_per_frame)
    if codes.shape != expected or times.shape != expected[:1] or codes.dtype != code_dtype(manifest.settings.codes):
        raise DataError(f"{path}: holds {codes.dtype} {list(codes.shape)}; its manifest says {list(expected)}")
    return codes, times


def _check_size(folder: Path, shard: Shard) -> None:
    path = folder / shard.file
    if path.parent != folder or not path.is_file():
        raise DataError(f"{path}: is missing; the copy of {folder} is not whole")
    size = path.stat().st_size
    if size != shard.size:
        raise DataError(f"{path}: has {size} bytes; its manifest says {shard.size}; the copy is not whole")


def _check_sum(path: Path, sha256: str, size: int | None) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        left = size if size is not None else path.stat().st_size
        while left and (block := file.read(min(left, 2**20))):
            digest.update(block)
            left -= len(block)
    if digest.hexdigest() != sha256:
        raise DataError(f"{path}: was changed: its SHA-256 is not its manifest's")
