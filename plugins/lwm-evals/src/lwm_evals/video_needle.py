"""The suite ``video-needle``: a picture hidden in a long video at known depths, asked about at its end.

The needle task (``lwm_evals.needle``) for frames, with nothing to download: coloured shapes or digits in a moving
background, each with one word for an answer. LWM shows the like by example alone, over an hour of video (arXiv
2402.08268, section 5.3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from lwm_core.errors import DataError
from lwm_core.protocols import EvalContext, EvalSetup, SamplingSpec, Scorer, VisionEncoder
from lwm_evals.files import Journal, Row
from lwm_evals.grid import ask_all, beside, in_order, plan_samples, read_results, write_results
from lwm_evals.haystacks import encode_once, open_haystack
from lwm_evals.options import VideoNeedleOptions
from lwm_evals.video_questions import Prompts, VideoQuestion, VideoQuestions, said_first

FIELDS = ("stage", "frames", "length", "depth", "place", "retrieved", "correct", "answer", "response", "choice")
"""Fields of a row of ``video-needle.json``, in order."""


class VideoNeedleSuite:
    """A visual needle over depths and numbers of frames; see :class:`VideoNeedleOptions` for what can be set.

    ``<out>.json`` holds ``rows`` (:data:`FIELDS`; ``length`` is in tokens, prompt and answer together; ``correct`` says
    whether the first of the words that may be answers in the response is the right one; ``choice`` is the likeliest of
    these words) and ``summary`` rows ``{stage, frames, length, accuracy, choice_accuracy, chance, samples}``, without
    ``choice_accuracy`` where it was not asked for. ``chance`` is what a guess among the words gives. Beside it lie
    ``<out>.jsonl``, to continue from, and ``<out>.codes.npz``, so that nothing is encoded twice.
    """

    def __init__(self, options: VideoNeedleOptions | None = None) -> None:
        self.options = options or VideoNeedleOptions()

    def check(self, setup: EvalSetup) -> None:
        """See :class:`lwm_core.protocols.ChecksSetup`.

        Raises:
            DataError, ShapeError: as :meth:`run`.
        """
        encoder = _encoder_of(setup)
        open_haystack(self.options, setup, encoder)
        Prompts(self.options, setup, encoder.codes_per_frame).clip_lengths()

    def run(self, context: EvalContext) -> Sequence[Mapping[str, Any]]:
        """Evaluate ``context.stage``, leaving out the samples that are done; returns its summary rows.

        Raises:
            DataError: no clip fits, or the haystack that is named cannot be used.
            ShapeError: a clip is shorter than its needle.
        """
        encoder = _encoder_of(context)
        prompts = Prompts(self.options, context, encoder.codes_per_frame)
        clips = prompts.clip_lengths()
        codes = encode_once(self.options, context, encoder, beside(context.out, ".codes.npz"))
        questions = VideoQuestions(self.options, context, codes, prompts)
        journal = Journal(beside(context.out, ".jsonl"), questions.fingerprint())

        def ask(length: int, samples: Sequence[int], size: int) -> list[Row]:
            asked = [questions.question(clips[length], i) for i in samples]
            return self._ask(asked, length, size, prompts, context)

        ask_all(context, journal, plan_samples(list(clips), self.options, context), self.options.batch_tokens, ask)
        rows = in_order(journal.rows.values())
        summary = summarize(rows, len(prompts.words))
        write_results(context.out, FIELDS, rows, summary)
        return [row for row in summary if row["stage"] == context.stage]

    def draw(self, out: Path) -> Mapping[str, bytes]:
        """SVG figures of all that ``<out>.json`` holds: a heat map a stage, and accuracy by frames."""
        results = read_results(out)
        rows, summary = results["rows"], results["summary"]
        if not rows:
            return {}
        from lwm_evals import figures

        drawn = {}
        for stage in dict.fromkeys(row["stage"] for row in rows):
            drawn[f"Video needle: {stage}"] = figures.heat_map(rows, stage, title=stage, across="frames")
        for name, title in (("accuracy", "Video needle accuracy"), ("choice_accuracy", "Video needle by likelihood")):
            told = [row for row in summary if name in row]
            if told:
                drawn[title] = figures.accuracy_by_length(
                    told, across="frames", value=name, label=title.lower(), chance=summary[0]["chance"]
                )
        return {title: figures.standalone(figure) for title, figure in drawn.items()}

    def _ask(
        self, batch: Sequence[VideoQuestion], length: int, size: int, prompts: Prompts, context: EvalContext
    ) -> list[Row]:
        """Rows of one batch; a smaller last batch is filled up to ``size`` and the filling's answers are dropped."""
        sampling = SamplingSpec(
            max_new_tokens=self.options.max_new_tokens, temperature=0.0, stop_ids=prompts.stop_ids()
        )
        asked = [question.prompt for question in batch]
        # A compiled generator would otherwise be compiled once more, for the last batch's shape alone.
        asked += [asked[-1]] * (size - len(asked))
        answers = context.generator.generate(asked, sampling)
        if len(answers) != len(asked):
            raise DataError(f"video-needle: the generator gave {len(answers)} answers to {len(asked)} prompts")
        rows = []
        for question, ids in zip(batch, answers[: len(batch)], strict=True):
            response = context.tokenizer.decode(ids)
            right = said_first(prompts.words, response) == question.answer
            choice = None
            if self.options.choose:
                choice = prompts.words[likeliest(context.scorer, question.prompt, prompts.answers())]
            rows.append({
                "stage": context.stage, "frames": question.frames, "length": length, "sample": question.sample,
                "depth": question.depth, "place": question.place, "retrieved": int(right), "correct": right,
                "answer": question.answer, "response": response, "choice": choice,
            })  # fmt: skip
        return rows


def likeliest(scorer: Scorer, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> int:
    """Which of ``answers`` (ids) is the likeliest after ``prompt``, its tokens together; the first of equal ones."""
    scores = [float(np.sum(scorer.log_likelihood([*prompt, *ids])[-len(ids) :], dtype=np.float64)) for ids in answers]
    return int(np.argmax(scores))


def summarize(rows: Sequence[Mapping[str, Any]], words: int) -> list[Row]:
    """A row for each stage and number of frames; ``words`` may be answers."""
    cells: dict[tuple[str, int, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["stage"], row["frames"], row["length"]), []).append(row)
    summary = []
    for (stage, frames, length), found in cells.items():
        told: Row = {"stage": stage, "frames": frames, "length": length}
        told["accuracy"] = sum(row["retrieved"] for row in found) / len(found)
        if all(row["choice"] is not None for row in found):
            told["choice_accuracy"] = sum(row["choice"] == row["answer"] for row in found) / len(found)
        summary.append({**told, "chance": 1 / words, "samples": len(found)})
    return summary


def _encoder_of(setup: EvalSetup) -> VisionEncoder:
    return cast(VisionEncoder, setup.encoder)  # its spec says that it needs one, so there is one
