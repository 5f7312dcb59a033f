"""The suite ``needle``: facts hidden in a long text at known depths, asked for at its end.

LWM's task (arXiv 2402.08268, section 5.2; N needles, R asked for: appendix) in the words of ``lwm_core.needles``. An
answer is greedy, and a number counts as retrieved if it is a substring of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lwm_core.errors import DataError
from lwm_core.protocols import EvalContext, SamplingSpec
from lwm_evals.files import Journal, Row
from lwm_evals.grid import ask_all, beside, in_order, known_lengths, plan_samples, read_results, write_results
from lwm_evals.options import NeedleOptions
from lwm_evals.questions import Question, Questions

FIELDS = ("stage", "length", "depth", "needles", "retrieved", "correct", "answer", "response")
"""Fields of a row of ``needle.json``, in order."""


class NeedleSuite:
    """Needle retrieval over depths and lengths; see :class:`NeedleOptions` for what can be set.

    ``<out>.json`` holds ``rows`` (:data:`FIELDS`; ``retrieved`` counts the numbers found, ``correct`` says whether it
    was all that were asked for) and ``summary`` rows ``{stage, length, accuracy, samples}``, where accuracy is the
    share of the numbers asked for that were retrieved. ``<out>.jsonl`` is kept beside it to continue from.
    """

    def __init__(self, options: NeedleOptions | None = None) -> None:
        self.options = options or NeedleOptions()

    def run(self, context: EvalContext) -> Sequence[Mapping[str, Any]]:
        """Evaluate ``context.stage``, leaving out the samples that are done; returns its summary rows.

        Raises:
            DataError: there is no text to hide needles in.
            ShapeError: a length is too short for needles, question and answer.
        """
        questions = Questions(self.options, context)
        journal = Journal(beside(context.out, ".jsonl"), questions.fingerprint())

        def ask(length: int, samples: Sequence[int], size: int) -> list[Row]:
            return self._ask([questions.question(length, i) for i in samples], size, context)

        ask_all(context, journal, self.plan(context), self.options.batch_tokens, ask)
        rows = in_order(journal.rows.values())
        summary = summarize(rows)
        write_results(context.out, FIELDS, rows, summary)
        return [row for row in summary if row["stage"] == context.stage]

    def plan(self, context: EvalContext) -> dict[int, int]:
        """Length → samples at ``context.stage``, shortest first.

        Raises:
            DataError: no length is known.
        """
        lengths = sorted(set(self.options.lengths or known_lengths(context)))
        if not lengths:
            raise DataError("needle: the run has no stages and no lengths are set; set lengths in [[evals]]")
        return plan_samples(lengths, self.options, context)

    def draw(self, out: Path) -> Mapping[str, bytes]:
        """SVG figures of all that ``<out>.json`` holds: a heat map a stage, and accuracy by length."""
        results = read_results(out)
        if not results["rows"]:
            return {}
        from lwm_evals import figures

        stages = list(dict.fromkeys(row["stage"] for row in results["rows"]))
        maps = {f"Needle retrieval: {s}": figures.heat_map(results["rows"], s, title=s) for s in stages}
        drawn = {**maps, "Needle accuracy by length": figures.accuracy_by_length(results["summary"])}
        return {title: figures.standalone(figure) for title, figure in drawn.items()}

    def _ask(self, batch: Sequence[Question], size: int, context: EvalContext) -> list[Row]:
        """Rows of one batch; a smaller last batch is filled up to ``size`` and the filling's answers are dropped."""
        tokenizer = context.tokenizer
        eos = tokenizer.special_ids.get("eos") if self.options.stop_at_eos else None
        sampling = SamplingSpec(
            max_new_tokens=self.options.new_tokens, temperature=0.0, stop_ids=() if eos is None else (eos,)
        )
        prompts = [question.prompt for question in batch]
        # A compiled generator would otherwise be compiled once more, for the last batch's shape alone.
        prompts += [prompts[-1]] * (size - len(prompts))
        answers = context.generator.generate(prompts, sampling)
        if len(answers) != len(prompts):
            raise DataError(f"needle: the generator gave {len(answers)} answers to {len(prompts)} prompts")
        return [
            self._row(question, tokenizer.decode(answer), context.stage)
            for question, answer in zip(batch, answers[: len(batch)], strict=True)
        ]

    def _row(self, question: Question, response: str, stage: str) -> Row:
        retrieved = count_retrieved(question.numbers, response)
        return {
            "stage": stage,
            "length": question.length,
            "sample": question.sample,
            "depth": question.depth,
            "needles": self.options.needles,
            "retrieved": retrieved,
            "correct": retrieved == len(question.numbers),
            "answer": ", ".join(question.numbers),
            "response": response,
        }


def count_retrieved(numbers: Sequence[str], response: str) -> int:
    """How many of ``numbers`` are substrings of ``response``, each looked for by itself (LWM's rule)."""
    return sum(number in response for number in numbers)


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """``{stage, length, accuracy, samples}`` of each stage and length: the share of asked numbers retrieved."""
    cells: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        asked = row["answer"].count(", ") + 1
        cells.setdefault((row["stage"], row["length"]), []).append(row["retrieved"] / asked)
    return [
        {"stage": stage, "length": length, "accuracy": sum(shares) / len(shares), "samples": len(shares)}
        for (stage, length), shares in cells.items()
    ]
