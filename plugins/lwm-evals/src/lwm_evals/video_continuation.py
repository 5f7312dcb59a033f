"""The suite ``video-continuation``: a clip that the model goes on with, beside what really follows.

Two things are told apart by the numbers: what the encoder loses of every frame, and what the model does. A clip that
stands still is continued well by whoever repeats its last frame, so that is what the model is compared with.

Shapes: T frames [T,S,S,3] uint8, G of them given; codes [T,n].
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lwm_core.errors import DataError, ShapeError
from lwm_core.frames import vision_tokens
from lwm_core.packaged import locate
from lwm_core.protocols import EvalContext, EvalSetup, SamplingSpec, VisionEncoder
from lwm_core.run.vision import ClipWriter, VisionPrompt, vision_prompt
from lwm_evals.files import Row, write_atomically
from lwm_evals.grid import beside, known_lengths, read_results
from lwm_evals.options import VideoContinuationOptions
from lwm_evals.read_frames import frames_at, told_by
from lwm_evals.similarity import psnr

SHOWN_SIDE = 128
"""Pixels of a frame's side in the figure, at least; small frames are enlarged by whole numbers."""

_GAP = 4  # pixels between two of them


@dataclass(frozen=True)
class Clip:
    """What is continued, and what really follows.

    Args:
        frames: ``[T,S,S,3]``.
        codes: ``[T,n]`` of them.
        decoded: ``[T,S,S,3]`` of the codes.
        first: the number of the first of them.
    """

    frames: NDArray[np.uint8]
    codes: NDArray[np.int32]
    decoded: NDArray[np.uint8]
    first: int


class VideoContinuationSuite:
    """Codes and PSNR of frames that a model writes; see :class:`VideoContinuationOptions` for what can be set.

    ``<out>.json`` holds ``rows`` ``{stage, frame, codes_equal, psnr, encoder_psnr, still_psnr}``, one a frame written:
    the share of codes that are those of the frame that follows, and the PSNR in dB, against that frame, of what was
    written, of what its own codes decode to, and of the last frame given. ``summary`` rows are their means by stage.
    ``<out>.codes.json`` keeps what was written, and ``<out>.png`` shows it: the clip, the clip through the encoder, and
    a row a stage. Stages whose length is shorter than the clip are left out.
    """

    def __init__(self, options: VideoContinuationOptions) -> None:
        self.options = options

    def check(self, setup: EvalSetup) -> None:
        """See :class:`lwm_core.protocols.ChecksSetup`.

        Raises:
            DataError: there is no video or picture at the path, it is damaged, or too short.
            ShapeError: the clip is longer than every stage, or the model has no ids for the encoder's codes.
        """
        encoder = cast(VisionEncoder, setup.encoder)
        longest, need = max(known_lengths(setup), default=0), self._tokens(setup, encoder)
        if need > longest:
            raise ShapeError(
                f"video-continuation: {self.options.given} frames given and {self.options.frames} written are {need} "
                f"tokens, but the longest stage has {longest}; lower given or frames"
            )
        self._frames(setup, encoder)

    def run(self, context: EvalContext) -> Sequence[Mapping[str, Any]]:
        """Have the clip continued at ``context.stage``, unless it was; returns the stage's summary row.

        Raises:
            DataError: the clip cannot be read, or is too short.
        """
        encoder = cast(VisionEncoder, context.encoder)
        context.progress(0, 1)
        stage = next((one for one in context.stages if one.name == context.stage), None)
        length = context.start_seq_len if stage is None else stage.seq_len
        if (length or 0) < self._tokens(context, encoder):
            context.progress(1, 1)
            return []
        clip = self._clip(context, encoder)
        written = self._written(context, clip, encoder)
        if context.stage not in written:
            written[context.stage] = self._write(context, clip, encoder).tolist()
            self._keep(context, clip, encoder, written)
        context.progress(1, 1)
        return [row for row in read_results(context.out)["summary"] if row["stage"] == context.stage]

    def draw(self, out: Path) -> Mapping[str, bytes]:
        """The clip, and its continuations below."""
        path = beside(out, ".png")
        return {"Continuation of a clip": path.read_bytes()} if path.exists() else {}

    def _clip(self, setup: EvalSetup, encoder: VisionEncoder) -> Clip:
        frames, first = self._frames(setup, encoder)
        codes = encoder.encode(frames)
        return Clip(frames, codes, encoder.decode(codes), first)

    def _frames(self, setup: EvalSetup, encoder: VisionEncoder) -> tuple[NDArray[np.uint8], int]:
        """The frames given and those that follow, and the number of the first."""
        chosen: list[int] = []
        with told_by("video-continuation"):
            path = locate(self.options.path, setup.base_dir)

            def choose(count: int) -> list[int]:
                chosen.extend(self._numbers(path, count))
                return chosen

            frames, _ = frames_at(path, encoder.frame_size, choose)
        return frames, chosen[0] // self.options.every

    def _numbers(self, path: Path, count: int) -> list[int]:
        """Which of ``count`` frames are given and written."""
        o = self.options
        taken = -(-count // o.every)
        first = taken - o.given - o.frames if o.at is None else o.at
        if first < 0 or first + o.given + o.frames > taken:
            start = "" if o.at is None else f"from frame {o.at} on "
            raise DataError(
                f"{path}: has {taken} frames (every = {o.every}), but {o.given} given and "
                f"{o.frames} written {start}need {(o.at or 0) + o.given + o.frames}; use a longer one, or lower given, "
                "frames or at"
            )
        return [number * o.every for number in range(first, first + o.given + o.frames)]

    def _write(self, context: EvalContext, clip: Clip, encoder: VisionEncoder) -> NDArray[np.int32]:
        o = self.options
        sampling = SamplingSpec(temperature=o.temperature, top_k=o.top_k, seed=context.seed)
        writer = ClipWriter(context.generator, context.vocabulary, clip.codes.shape[1], encoder.codes)
        with closing(writer):
            writer.begin(self._prompt(context), guided=False, frames=o.frames, given=clip.codes[: o.given])
            return np.stack(list(writer.write(o.frames, sampling)))

    def _prompt(self, setup: EvalSetup) -> VisionPrompt:
        prompt = vision_prompt("video", self.options.caption or "", setup.tokenizer)
        return prompt if self.options.caption else VisionPrompt(prompt.unconditional, prompt.unconditional)

    def _tokens(self, setup: EvalSetup, encoder: VisionEncoder) -> int:
        frames = self.options.given + self.options.frames
        return len(self._prompt(setup).conditional) + vision_tokens(frames, encoder.codes_per_frame)

    def _written(self, context: EvalContext, clip: Clip, encoder: VisionEncoder) -> dict[str, Any]:
        """Stage → codes that were written before for this very clip and these options."""
        path = beside(context.out, ".codes.json")
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        same = isinstance(kept, dict) and kept.get("settings") == self._settings(context, clip, encoder)
        return dict(kept["stages"]) if same else {}

    def _settings(self, context: EvalContext, clip: Clip, encoder: VisionEncoder) -> str:
        """12 hex digits of all that decides on what is written, but for the model."""
        said = repr((self.options, context.seed, encoder.checksum, clip.frames.shape)).encode() + clip.codes.tobytes()
        return hashlib.sha256(said).hexdigest()[:12]

    def _keep(self, context: EvalContext, clip: Clip, encoder: VisionEncoder, written: dict[str, Any]) -> None:
        rows, pictures = [], []
        given = self.options.given
        for stage, codes in written.items():
            made = np.asarray(codes, np.int32)
            pictures.append(encoder.decode(made))
            rows += compare(stage, clip, given, made, pictures[-1])
        results = {"rows": rows, "summary": summarize(rows)}
        kept = {"settings": self._settings(context, clip, encoder), "stages": written}
        write_atomically(beside(context.out, ".png"), sheet(clip, given, pictures))
        write_atomically(beside(context.out, ".json"), (json.dumps(results, indent=1) + "\n").encode())
        write_atomically(beside(context.out, ".codes.json"), (json.dumps(kept) + "\n").encode())


def compare(stage: str, clip: Clip, given: int, codes: NDArray[np.int32], made: NDArray[np.uint8]) -> list[Row]:
    """A row for each frame written: ``codes [T-G,n]``, which decode to ``made [T-G,S,S,3]``."""
    wanted = clip.frames[given:]
    still = np.broadcast_to(clip.decoded[given - 1], wanted.shape)
    ratios = {"psnr": made, "encoder_psnr": clip.decoded[given:], "still_psnr": still}
    found = {name: psnr(frames, wanted) for name, frames in ratios.items()}
    return [
        {
            "stage": stage, "frame": clip.first + given + t,
            "codes_equal": float((codes[t] == clip.codes[given + t]).mean()),
            **{name: float(value[t]) if np.isfinite(value[t]) else None for name, value in found.items()},
        }
        for t in range(len(wanted))
    ]  # fmt: skip


def summarize(rows: Sequence[Row]) -> list[Row]:
    """The means of each stage; of PSNR over frames that are not equal to the bit."""
    summary = []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        mine = [row for row in rows if row["stage"] == stage]
        row: Row = {"stage": stage, "written": len(mine)}
        for name in ("codes_equal", "psnr", "encoder_psnr", "still_psnr"):
            values = [one[name] for one in mine if one[name] is not None]
            row[name] = sum(values) / len(values) if values else None
        summary.append(row)
    return summary


def sheet(clip: Clip, given: int, written: Sequence[NDArray[np.uint8]]) -> bytes:
    """A PNG: the clip's frames in a row, the same through the encoder, and what each stage wrote below its place."""
    side = clip.frames.shape[1]
    zoom = max(1, -(-SHOWN_SIDE // side))
    step = side * zoom + _GAP
    rows = [(0, clip.frames), (0, clip.decoded), *((given, frames) for frames in written)]
    picture = Image.new("RGBA", (len(clip.frames) * step - _GAP, len(rows) * step - _GAP))
    for y, (first, frames) in enumerate(rows):
        for x, frame in enumerate(frames):
            tile = Image.fromarray(frame).resize((side * zoom, side * zoom), Image.Resampling.BICUBIC)
            picture.paste(tile, ((first + x) * step, y * step))
    buffer = BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
