"""Sources to shards: decoded ahead in a thread, encoded in batches, committed every few seconds.

Shapes: B frames of sides S in a batch, L codes a frame.

Batches are cut from all rows one after the other, whatever videos they are of, so that they are the same after a kill
as without one, and pictures are encoded as many at a time as frames are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lwm_core.errors import DataError, PluginError, UsageError
from lwm_core.protocols import VisionEncoder
from lwm_core.shards.layout import Current, Settings, Video
from lwm_vqgan.ahead import made_ahead
from lwm_vqgan.media.crop import preprocess
from lwm_vqgan.media.files import Source
from lwm_vqgan.media.read import open_clip
from lwm_vqgan.media.sampling import Sampling
from lwm_vqgan.progress import EncodeProgress
from lwm_vqgan.shards.writer import ShardWriter

_COMMIT_SECONDS = 10.0


class Begun(NamedTuple):
    """A source begins; ``frames`` are taken of it, ``done`` of which are there."""

    source: Source
    frames: int
    done: int


class Taken(NamedTuple):
    """A frame of the source that has begun: ``[S,S,3]`` RGB uint8."""

    time: float
    pixels: NDArray[np.uint8]


class Ended(NamedTuple):
    """The source is through, or broke."""

    fps: float | None
    broken: str


Item = Begun | Taken | Ended


@dataclass(frozen=True)
class EncodeJob:
    """What is encoded into where.

    Args:
        sources: pictures and videos, in order.
        folder: of the shards; made if need be.
        encoder: made by its plugin.
        settings: see :class:`Settings`.
        skip_broken: keep what could be read of a broken file, note it, and go on, instead of ending.
        commit_seconds: between commits, at most (and the time of a batch).
    """

    sources: Sequence[Source]
    folder: Path
    encoder: VisionEncoder
    settings: Settings
    skip_broken: bool = False
    commit_seconds: float = _COMMIT_SECONDS


def encode_sources(job: EncodeJob, progress: EncodeProgress, check_stop: Callable[[], None]) -> ShardWriter:
    """Encode what is not yet in the folder; returns its writer, everything committed.

    Args:
        check_stop: called after each batch; what it raises ends the work, after a commit.

    Raises:
        UsageError: the folder was begun with other settings or other sources.
        DataError: a file is broken (and ``skip_broken`` is off), or the folder is damaged or cannot be written.
        PluginError: the encoder gives something other than codes.
    """
    writer = ShardWriter(job.folder, job.settings)
    _check_sources(job, writer)
    if writer.manifest.complete:
        return writer
    progress.begin(sum(source.size for source in job.sources), sum(video.size for video in writer.videos))
    done = 0 if writer.current is None else writer.current.frames
    items = made_ahead(_items(job, len(writer.videos), done), max(2 * job.settings.batch, 8))
    with closing(items):
        try:
            _fill(job, writer, items, progress, check_stop)
        except DataError:
            writer.commit()
            raise
    writer.commit(complete=True)
    return writer


def _check_sources(job: EncodeJob, writer: ShardWriter) -> None:
    """Hold the sources that have been begun against those that are given."""
    current = [] if writer.current is None else [writer.current]
    begun: list[Video | Current] = [*writer.videos, *current]
    for number, one in enumerate(begun):
        now = job.sources[number] if number < len(job.sources) else None
        if now is None or (now.name, now.size) != (one.name, one.size):
            got = "nothing" if now is None else f"{now.name} ({now.size} bytes)"
            raise UsageError(
                f"{job.folder}: file {number + 1} was {one.name} ({one.size} bytes), now {got}; "
                "go on with the same files, or name another folder"
            )
    if writer.manifest.complete and len(job.sources) > len(begun):
        raise UsageError(
            f"{job.folder}: is complete with {len(begun)} files, and {job.sources[len(begun)].name} is not among them; "
            "name another folder for further files"
        )


def _items(job: EncodeJob, first: int, done: int) -> Iterator[Item]:
    """The sources from number ``first`` on, of which ``done`` frames are there; runs in the thread that decodes."""
    sampling = Sampling(job.settings.frames, job.settings.fps)
    for source in job.sources[first:]:
        clip, broken = None, ""
        try:
            clip = open_clip(source.path, sampling)
            yield Begun(source, clip.length, done)
            with closing(clip.frames(done)) as frames:
                for frame in frames:
                    yield Taken(frame.time, preprocess(frame.pixels, job.settings.frame_size))
        except DataError as error:
            if not job.skip_broken:
                raise
            broken = str(error).removeprefix(f"{source.path}: ")
            if clip is None:
                yield Begun(source, 0, done)
        yield Ended(None if clip is None else clip.fps, broken)
        done = 0


def _fill(
    job: EncodeJob, writer: ShardWriter, items: Iterator[Item], progress: EncodeProgress, check_stop: Callable[[], None]
) -> None:
    batch: list[Taken] = []
    marks: list[tuple[int, Begun | Ended]] = []  # with the row of the batch that each stands before
    committed = time.monotonic()

    def flush() -> None:
        if batch:
            writer.add(_encoded(job, np.stack([one.pixels for one in batch])), np.array([one.time for one in batch]))
        at = 0
        for row, mark in [*marks, (len(batch), None)]:
            if row > at:
                writer.count(row - at)
                progress.frames(row - at)
                at = row
            if isinstance(mark, Begun):
                writer.begin(mark.source)
                progress.source(mark.source.name, mark.source.size, mark.frames, mark.done)
            elif mark is not None:
                writer.end(*mark)
                progress.ended(mark.broken)
        progress.show()
        batch.clear()
        marks.clear()

    for item in items:
        if not isinstance(item, Taken):
            marks.append((len(batch), item))
            continue
        batch.append(item)
        if len(batch) < job.settings.batch:
            continue
        flush()
        now = time.monotonic()
        if writer.waiting >= job.settings.shard_frames or now - committed >= job.commit_seconds:
            writer.commit()
            committed = now
        try:
            check_stop()
        except BaseException:
            writer.commit()
            raise
    flush()


def _encoded(job: EncodeJob, frames: NDArray[np.uint8]) -> NDArray[np.integer]:
    """``[B,S,S,3]`` → ``[B,L]``, held against what an encoder promises."""
    codes = job.encoder.encode(frames)
    if codes.ndim != 2 or len(codes) != len(frames) or codes.dtype.kind not in "iu":
        raise PluginError(
            f"encoder {job.settings.encoder!r} gave {codes.dtype} {list(codes.shape)} for {len(frames)} frames; "
            f"expected whole numbers [{len(frames)}, codes a frame]"
        )
    if codes.min() < 0 or codes.max() >= job.settings.codes:
        raise PluginError(
            f"encoder {job.settings.encoder!r} gave codes from {codes.min()} to {codes.max()}; "
            f"expected 0 to {job.settings.codes - 1}"
        )
    return codes
