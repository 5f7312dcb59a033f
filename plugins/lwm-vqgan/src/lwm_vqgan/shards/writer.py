"""Rows of codes into shards. What was committed is never lost; a kill costs what came after the last commit.

Shapes: n rows of L codes.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from lwm_core.durable import write_whole
from lwm_core.errors import DataError, UsageError
from lwm_core.shards.layout import (
    MANIFEST,
    VIDEOS,
    Current,
    Manifest,
    Settings,
    Shard,
    Video,
    code_dtype,
    read_manifest,
    read_videos,
)
from lwm_core.shards.reader import map_shard
from lwm_vqgan.media.files import Source
from lwm_vqgan.shards.disk import append

_BEGUN = frozenset({".lock", VIDEOS, f"{MANIFEST}.partial"})  # what a folder may hold whose first manifest was cut off
_PART = re.compile(r"\d+-\d+\.safetensors|.*\.partial")


class ShardWriter:
    """A folder of codes that is being filled.

    Calls come in the order of the sources: ``begin``, ``add`` with rows, ``count`` of those that are the source's,
    ``end``. Rows may be added before the source that they belong to has begun; all are counted before a commit.

    Args:
        folder: empty, or filled in part under the same settings; it exists.
        settings: see :class:`Settings`.

    Attributes:
        manifest: as it was last committed.
        videos: those that are through.
        current: the one that is not.
        frames: rows in all.

    Raises:
        UsageError: the folder holds something else, or codes made under other settings.
        DataError: it is damaged.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self._folder = folder
        if not (folder / MANIFEST).exists():
            self._start_new(settings)
        self.manifest = read_manifest(folder)
        different = self.manifest.settings.difference(settings)
        if different:
            raise UsageError(f"{folder}: was begun with {different}; go on with the same, or name another folder")
        self.videos = read_videos(folder, self.manifest)
        self.current = self.manifest.current
        self.frames = self.manifest.frames
        self._digest = self._videos_digest()
        self._lines = b""  # of videos that are through, uncommitted
        self._whole = [shard for shard in self.manifest.shards if shard.frames == settings.shard_frames]
        self._rows: list[tuple[NDArray[Any], NDArray[np.float64]]] = []  # of the shard that is not full
        if len(self._whole) < len(self.manifest.shards):
            codes, times = map_shard(folder, self.manifest.shards[-1], self.manifest, verify=True)
            self._rows.append((np.array(codes), np.array(times)))  # its file goes with the next commit
        self._clean()

    @property
    def waiting(self) -> int:
        """Rows of the shard that is not full."""
        return sum(len(codes) for codes, _ in self._rows)

    def begin(self, source: Source) -> None:
        """The rows that follow are of this source; one that was interrupted is gone on with."""
        if self.current is None:
            self.current = Current(source.name, source.size, 0)

    def add(self, codes: NDArray[np.integer], times: NDArray[np.float64]) -> None:
        """``[n, L]`` codes and ``[n]`` times after those that are there."""
        dtype = code_dtype(self.manifest.settings.codes)
        self._rows.append((codes.astype(dtype), times.astype("<f8")))
        self.frames += len(codes)

    def count(self, frames: int) -> None:
        """So many rows are of the current source."""
        assert self.current is not None
        self.current = replace(self.current, frames=self.current.frames + frames)

    def end(self, fps: float | None, broken: str = "") -> None:
        """The current source is through."""
        assert self.current is not None
        last = self.videos[-1] if self.videos else None
        start = 0 if last is None else last.start + last.frames
        video = Video(self.current.name, self.current.size, start, self.current.frames, fps, broken)
        self.videos.append(video)
        self._lines += json.dumps(asdict(video)).encode() + b"\n"
        self.current = None

    def commit(self, *, complete: bool = False) -> None:
        """Make all that was added last. Every file reaches the disk before the manifest takes its name.

        Raises:
            DataError: it cannot be written, as on a full disk; what was committed before is untouched.
        """
        try:
            shards = self._write_rows(complete)
            append(self._folder / VIDEOS, self._lines, self.manifest.videos_size)
            digest = self._digest.copy()
            digest.update(self._lines)
            manifest = replace(
                self.manifest, complete=complete, frames=self.frames, videos=len(self.videos), shards=shards,
                tokens_per_frame=self._rows[-1][0].shape[1] if self._rows else self.manifest.tokens_per_frame,
                videos_size=self.manifest.videos_size + len(self._lines), videos_sha256=digest.hexdigest(),
                current=self.current,
            )  # fmt: skip
            write_whole(self._folder / MANIFEST, manifest.text().encode())
        except OSError as error:
            raise DataError(
                f"{self._folder}: cannot be written: {error.strerror or error}; "
                f"{self.manifest.frames} frames are safe, and the same command goes on from there"
            ) from None
        self.manifest, self._digest, self._lines = manifest, digest, b""
        if self._whole != list(shards) and shards and shards[-1].frames == manifest.settings.shard_frames:
            self._whole, self._rows = list(shards), []
        self._clean()

    def _write_rows(self, complete: bool) -> tuple[Shard, ...]:
        """The shards with the one that is being filled, which is written if it has new rows or a new name."""
        if not self.waiting:
            return tuple(self._whole)
        codes, times = (np.concatenate(parts) for parts in zip(*self._rows, strict=True))
        self._rows = [(codes, times)]
        whole = complete or len(codes) == self.manifest.settings.shard_frames
        name = f"{len(self._whole):05d}{'' if whole else f'-{len(codes)}'}.safetensors"
        before = self.manifest.shards[-1] if self.manifest.shards else None
        if before is not None and before.file == name:
            return self.manifest.shards
        data = save({"codes": codes, "times": times})
        write_whole(self._folder / name, data)
        return (*self._whole, Shard(name, len(codes), len(data), hashlib.sha256(data).hexdigest()))

    def _start_new(self, settings: Settings) -> None:
        strange = sorted(entry.name for entry in self._folder.iterdir() if entry.name not in _BEGUN)
        if strange:
            raise UsageError(f"{self._folder}: holds {strange[0]} and no {MANIFEST}; name a new folder for the codes")
        write_whole(self._folder / VIDEOS, b"")
        empty = Manifest(settings, False, 0, 0, 0, 0, hashlib.sha256().hexdigest(), None, ())
        write_whole(self._folder / MANIFEST, empty.text().encode())

    def _videos_digest(self) -> Any:
        with (self._folder / VIDEOS).open("rb") as file:
            digest = hashlib.sha256(file.read(self.manifest.videos_size))
        if digest.hexdigest() != self.manifest.videos_sha256:
            raise DataError(f"{self._folder / VIDEOS}: was changed: its SHA-256 is not its manifest's")
        return digest

    def _clean(self) -> None:
        """Remove what a kill or an earlier commit left of a shard that was not full."""
        kept = {shard.file for shard in self.manifest.shards}
        for entry in self._folder.iterdir():
            if _PART.fullmatch(entry.name) and entry.name not in kept:
                entry.unlink()
