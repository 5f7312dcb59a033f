"""The suite ``video-loss``: how much better a model foretells a video's next frame the more frames it has seen.

The frames that are predicted are the same for every number of frames before them, so that what is compared is the
context alone.

Shapes: n codes a frame, N tokens of a sequence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lwm_core.errors import DataError, ShapeError
from lwm_core.frames import frame_tokens, vision_tokens
from lwm_core.protocols import EvalContext, EvalSetup
from lwm_core.run.vision import vision_prompt
from lwm_evals.clips import Clips, open_clips
from lwm_evals.files import Journal, Row
from lwm_evals.grid import ask_all, beside, in_order, known_lengths, read_results, write_results
from lwm_evals.options import VideoLossOptions

FIELDS = ("stage", "frames", "length", "video", "frame", "nats")
"""Fields of a row of ``video-loss.json``, in order."""


@dataclass(frozen=True)
class Plan:
    """What is predicted.

    Args:
        clips: the videos, none of which is trained on.
        lengths: length in tokens → frames before, fewest first.
        first: the first frame of a video that may be predicted: one that has all of them before it.
        counts: by video, how many frames may be.
    """

    clips: Clips
    lengths: dict[int, int]
    first: int
    counts: NDArray[np.int64]


class VideoLossSuite:
    """Loss of the next frame by frames before it; see :class:`VideoLossOptions` for what can be set.

    ``<out>.json`` holds ``rows`` (:data:`FIELDS`: the mean negative log-likelihood of the n codes of frame ``frame`` of
    ``video`` after the ``frames`` before it, in nats; its delimiter does not count) and ``summary`` rows
    ``{stage, frames, length, nats, uniform, samples}``: the mean, and what a model that holds all codes for equally
    likely would have. ``<out>.jsonl`` is kept beside it to continue from.
    """

    def __init__(self, options: VideoLossOptions) -> None:
        self.options = options

    def check(self, setup: EvalSetup) -> None:
        """See :class:`lwm_core.protocols.ChecksSetup`.

        Raises:
            DataError, ShapeError: as :meth:`run`.
        """
        self.plan(setup)

    def run(self, context: EvalContext) -> Sequence[Mapping[str, Any]]:
        """Evaluate ``context.stage``, leaving out the samples that are done; returns its summary rows.

        Raises:
            DataError: the folder cannot be read, is of another encoder than the codes trained on, or its videos are too
                short.
            ShapeError: the model has no ids for its codes.
        """
        plan = self.plan(context)
        journal = Journal(beside(context.out, ".jsonl"), self._fingerprint(plan, context))

        def ask(length: int, samples: Sequence[int], size: int) -> list[Row]:
            return [self._row(plan, length, sample, context) for sample in samples]

        # A row is a whole reading: each is on disk before the next begins.
        ask_all(context, journal, dict.fromkeys(plan.lengths, self.options.samples), 1, ask)
        rows = in_order(journal.rows.values())
        summary = summarize(rows, plan.clips.shards.manifest.settings.codes)
        write_results(context.out, FIELDS, rows, summary)
        return [row for row in summary if row["stage"] == context.stage]

    def draw(self, out: Path) -> Mapping[str, bytes]:
        """An SVG figure of all that ``<out>.json`` holds: nats by frames before, a line a stage."""
        summary = read_results(out)["summary"]
        if not summary:
            return {}
        from lwm_evals import figures

        return {"Video loss by frames before": figures.standalone(figures.loss_by_frames(summary))}

    def plan(self, setup: EvalSetup) -> Plan:
        """The frames that may be predicted, and from how many; raises as :meth:`run`."""
        clips = _open(self.options.path, setup)
        shards = clips.shards
        of_which = "" if clips.names is None else f" of the {len(clips.names)} held out"
        longest = max((video.frames for video in clips.videos), default=0) - 1
        per_frame = shards.manifest.tokens_per_frame
        start = len(_start(setup))
        if self.options.frames is not None:
            befores = sorted(set(self.options.frames))
        else:
            most = max(known_lengths(setup), default=0) - start
            room = min(longest, (most + 1) // vision_tokens(1, per_frame) - 1)  # the last frame's delimiter is left out
            befores = [2**k for k in range(max(0, room).bit_length()) if 2**k <= room]
            if not befores:
                raise DataError(
                    f"video-loss: {shards.folder}: two frames of {per_frame} codes are needed, but its longest video"
                    f"{of_which} has {longest + 1} and the longest stage {most + start} tokens; use longer ones, or "
                    "set frames"
                )
        if longest < befores[-1]:
            raise DataError(
                f"video-loss: {shards.folder}: its longest video{of_which} has {longest + 1} frames, but frames = "
                f"{befores[-1]} before the one that is predicted need {befores[-1] + 1}; encode a longer one, or lower "
                "frames"
            )
        counts = np.array([max(0, video.frames - befores[-1]) for video in clips.videos], np.int64)
        lengths = {start + vision_tokens(before + 1, per_frame) - 1: before for before in befores}
        return Plan(clips, lengths, befores[-1], counts)

    def _row(self, plan: Plan, length: int, sample: int, context: EvalContext) -> Row:
        video, frame = target(plan, context.seed, sample)
        before = plan.lengths[length]
        codes = plan.clips.codes(video, frame - before, frame + 1)
        ids = [*_start(context), *frame_tokens(codes, context.vocabulary)[:-1].tolist()]
        predicted = np.asarray(context.scorer.log_likelihood(ids), np.float64)[-codes.shape[1] :]
        return {
            "stage": context.stage, "frames": before, "length": length, "sample": sample,
            "video": plan.clips.videos[video].name, "frame": frame, "nats": float(-predicted.mean()),
        }  # fmt: skip

    def _fingerprint(self, plan: Plan, context: EvalContext) -> str:
        """12 hex digits of all that decides on what is predicted, but for how often and from how few."""
        manifest = plan.clips.shards.manifest
        files = [shard.sha256 for shard in manifest.shards]
        said = repr((context.seed, max(plan.lengths.values()), _start(context), manifest.videos_sha256, files,
                     *filter(None, [plan.clips.names])))  # fmt: skip
        return hashlib.sha256(said.encode()).hexdigest()[:12]


def target(plan: Plan, seed: int, sample: int) -> tuple[int, int]:
    """Video and frame of a sample: any that has enough frames before it, a pure function of (seed, sample)."""
    place = int(np.random.default_rng([seed, sample]).integers(plan.counts.sum()))
    ends = np.cumsum(plan.counts)
    video = int(np.searchsorted(ends, place, side="right"))
    return video, int(plan.first + place - (ends[video] - plan.counts[video]))


def summarize(rows: Sequence[Mapping[str, Any]], codes: int) -> list[Row]:
    """The mean of each stage and number of frames before; ``codes`` is the size of the codebook."""
    cells: dict[tuple[str, int, int], list[float]] = {}
    for row in rows:
        cells.setdefault((row["stage"], row["frames"], row["length"]), []).append(row["nats"])
    return [
        {"stage": stage, "frames": frames, "length": length, "nats": sum(found) / len(found), "uniform": log(codes),
         "samples": len(found)}
        for (stage, frames, length), found in cells.items()
    ]  # fmt: skip


def _start(setup: EvalSetup) -> list[int]:
    """What stands before a clip that nothing is said about: ``<s><vision>``."""
    return list(vision_prompt("video", "", setup.tokenizer).unconditional)


def _open(path: str | None, setup: EvalSetup) -> Clips:
    clips = open_clips("video-loss: ", path, setup)
    shards = clips.shards
    made = shards.manifest.settings
    vocabulary = setup.vocabulary
    has = vocabulary.vision_codes if vocabulary.vision_size else 0
    if made.codes > has:
        raise ShapeError(
            f"video-loss: {shards.folder} holds codes of {made.encoder!r}, which has {made.codes}, but the model has "
            f"ids for {has}; set model.vision_size to what the codes and two delimiters need (LWM: 8448)"
        )
    for name, trained in setup.trained_codes.items():
        if trained.checksum != made.checksum:
            raise DataError(
                f"video-loss: the codes in {shards.folder} are of {made.encoder} {made.checksum[:12]}, but data source "
                f"{name!r} trains on codes of {trained.encoder} {trained.checksum[:12]}; encode it again with that one"
            )
    return clips
