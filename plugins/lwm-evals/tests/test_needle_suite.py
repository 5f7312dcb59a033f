"""The needle suite with mock models: what is asked, how it is scored, what is written."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lwm_core import needles
from lwm_core.builtins.byte_tokens import BytesTokenizer
from lwm_core.errors import DataError, ShapeError
from lwm_core.protocols import EvalContext
from lwm_evals import NeedleOptions, NeedleSuite
from lwm_evals.grid import batch_size
from lwm_evals.needle import FIELDS, count_retrieved
from lwm_evals.questions import Questions

SMALL = NeedleOptions(samples=4, samples_longest=6, depths=3, batch_tokens=3000)
PLANTED = re.compile(r"\nThe special magic (\w+) number is: (\d+)\n")

MakeContext = Callable[..., EvalContext]


def results(context: EvalContext) -> dict[str, Any]:
    return dict(json.loads(Path(f"{context.out}.json").read_text()))


def prompts(context: EvalContext) -> list[list[int]]:
    return list(context.generator.prompts)  # type: ignore[attr-defined]


def test_a_perfect_model_scores_one(make_context: MakeContext) -> None:
    context = make_context()
    summary = NeedleSuite(SMALL).run(context)
    assert summary == [
        {"stage": "base", "length": 384, "accuracy": 1.0, "samples": 4},
        {"stage": "base", "length": 512, "accuracy": 1.0, "samples": 4},
        {"stage": "base", "length": 1024, "accuracy": 1.0, "samples": 6},
    ]
    found = results(context)
    assert found["summary"] == summary
    assert all(tuple(row) == FIELDS and row["correct"] is True and row["retrieved"] == 1 for row in found["rows"])
    assert all(row["answer"] in row["response"] for row in found["rows"])


def test_a_silent_model_and_one_that_is_always_wrong_score_zero(make_context: MakeContext, perfect: Any) -> None:
    def wrong(prompt: str) -> str:
        return re.sub(r"\d", lambda digit: str((int(digit[0]) + 1) % 10), perfect(prompt))

    for answer in (lambda prompt: "", wrong):
        context = make_context(answer, out=make_context().out.with_name(f"needle-{answer.__name__.strip('<>')}"))
        summary = NeedleSuite(SMALL).run(context)
        assert [row["accuracy"] for row in summary] == [0.0, 0.0, 0.0]
        assert not any(row["correct"] or row["retrieved"] for row in results(context)["rows"])


def test_prompt_and_answer_fill_the_length_exactly(make_context: MakeContext) -> None:
    options = NeedleOptions(samples=9, samples_longest=9, depths=9)
    context = make_context()
    NeedleSuite(options).run(context)
    lengths = Counter(map(len, prompts(context)))
    assert lengths == {384 - 32: 9, 512 - 32: 9, 1024 - 32: 9}
    assert {sampling.max_new_tokens for sampling in context.generator.sampling} == {32}  # type: ignore[attr-defined]


def test_answers_are_greedy_and_end_at_eos(make_context: MakeContext) -> None:
    for stop, ids in ((True, (257,)), (False, ())):
        context = make_context(out=make_context().out.with_name(f"stop-{stop}"))
        NeedleSuite(SMALL.model_copy(update={"stop_at_eos": stop})).run(context)
        assert {(s.temperature, s.stop_ids) for s in context.generator.sampling} == {(0.0, ids)}  # type: ignore[attr-defined]


def test_every_stage_is_asked_the_same(make_context: MakeContext) -> None:
    contexts = [make_context(stage=stage) for stage in ("base", "512", "1024")]
    for context in contexts:
        NeedleSuite(SMALL).run(context)
    base, middle, final = (prompts(context) for context in contexts)
    assert base == final
    assert [p for p in middle if len(p) < 900] == [p for p in base if len(p) < 900]
    assert [p for p in middle if len(p) > 900] == [p for p in base if len(p) > 900][:4]  # the first samples of six
    rows = results(contexts[-1])["rows"]
    assert list(dict.fromkeys(row["stage"] for row in rows)) == ["base", "512", "1024"]


def test_another_seed_asks_other_questions(make_context: MakeContext) -> None:
    one, other = (Questions(SMALL, make_context(seed=seed)) for seed in (1, 2))
    asked = [one.question(512, i).numbers for i in range(8)]
    assert len(set(asked)) == 8
    assert not set(asked) & {other.question(512, i).numbers for i in range(8)}
    assert asked != [one.question(1024, i).numbers for i in range(8)]


def test_cities_numbers_and_text_are_held_out(make_context: MakeContext) -> None:
    context = make_context()
    NeedleSuite(NeedleOptions(samples=20, samples_longest=20, needles=3, lengths=(1024,))).run(context)
    for prompt in prompts(context):
        text = BytesTokenizer().decode(prompt)
        planted = PLANTED.findall(text)
        assert len({city for city, _ in planted}) == len({number for _, number in planted}) == 3
        for city, number in planted:
            assert city in needles.cities("held-out") and city not in needles.cities("train")
            assert len(number) == 7 and int(number) % 7 == 0
        assert text.startswith(needles.PROMPT_START) and text.endswith(needles.PROMPT_END)
        bare = PLANTED.sub("", text[len(needles.PROMPT_START) : text.rindex(" What ")])
        assert re.fullmatch(r"[\s\S]*And it came to pass in the land of verse[\s\S]*", bare)


def test_a_needle_lies_at_its_depth(make_context: MakeContext) -> None:
    questions = Questions(NeedleOptions(depths=(0.0, 0.5, 1.0)), make_context())
    for sample, low, high in ((0, 0.0, 0.0), (1, 0.40, 0.5), (2, 0.90, 1.0)):
        question = questions.question(1024, sample)
        text = BytesTokenizer().decode(question.prompt)
        body = text[len(needles.PROMPT_START) : text.rindex(" What ")]
        found = PLANTED.search(body)
        assert found is not None
        before = found.start() / (len(body) - len(found[0]))
        assert low <= before <= high, (sample, before)
        assert question.depth == (0.0, 0.5, 1.0)[sample]


def test_of_several_needles_some_are_asked_for(make_context: MakeContext) -> None:
    options = NeedleOptions(samples=5, samples_longest=5, needles=4, retrieve=2, lengths=(1024,))

    def half(prompt: str) -> str:
        first = PLANTED.findall(prompt)
        asked = re.search(r"numbers for (\w+) and (\w+)\?", prompt)
        assert asked is not None and len(first) == 4
        return f" {dict(first)[asked[1]]} and I forgot {asked[2]}"

    context = make_context(half)
    [summary] = NeedleSuite(options).run(context)
    assert summary["accuracy"] == 0.5
    for row in results(context)["rows"]:
        assert (row["needles"], row["retrieved"], row["correct"]) == (4, 1, False)
        assert len(row["answer"].split(", ")) == 2


@pytest.mark.parametrize(
    ("response", "count"),
    [
        (" 1234567", 1),
        (" 1234567, 2345678", 2),
        (" 2345678, 1234567 and 1234567 again", 2),  # said twice, found once
        (" 12345678", 2),  # overlapping: each is a substring of its own
        (" 123456", 0),
        (" 1,234,567", 0),
        ("", 0),
    ],
)
def test_numbers_are_counted_one_by_one(response: str, count: int) -> None:
    assert count_retrieved(("1234567", "2345678"), response) == count


def test_the_longest_length_gets_its_samples_where_asked(make_context: MakeContext) -> None:
    def counts(stage: str, **options: Any) -> list[int]:
        suite = NeedleSuite(NeedleOptions(samples=20, samples_longest=100, **options))
        return list(suite.plan(make_context(stage=stage)).values())

    assert [counts(stage) for stage in ("base", "512", "1024")] == [[20, 20, 100], [20, 20, 20], [20, 20, 100]]
    assert counts("512", samples_longest_at="all") == [20, 20, 100]
    assert counts("512", lengths=(700, 500, 700)) == [20, 20]
    assert list(NeedleSuite().plan(make_context(start_seq_len=None))) == [512, 1024]
    with pytest.raises(DataError, match="set lengths"):
        NeedleSuite().plan(make_context(stages=[], start_seq_len=None))


def test_batches_are_equal_and_within_the_limit(make_context: MakeContext) -> None:
    given = ((100, 8), (20, 16), (1, 8), (0, 8), (7, 0), (9, 3))
    assert [batch_size(samples, most) for samples, most in given] == [8, 10, 1, 1, 1, 3]
    context = make_context()
    NeedleSuite(NeedleOptions(samples=5, samples_longest=5, lengths=(512,), batch_tokens=2048)).run(context)
    assert context.generator.batches == [3, 3]  # type: ignore[attr-defined]
    assert len(results(context)["rows"]) == 5


def test_progress_counts_every_sample(make_context: MakeContext) -> None:
    calls: list[tuple[int, int]] = []
    context = make_context(progress=lambda done, total: calls.append((done, total)))
    NeedleSuite(SMALL).run(context)
    assert calls[0] == (0, 14) and calls[-1] == (14, 14)
    assert calls == sorted(calls)


def test_text_to_hide_needles_in_may_be_a_file(make_context: MakeContext, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("Call me Ishmael. " * 10)  # shorter than the context: read round again
    context = make_context(held_out=lambda: ())
    NeedleSuite(SMALL.model_copy(update={"haystack": "own.txt"})).run(context)
    assert all("Ishmael" in BytesTokenizer().decode(prompt) for prompt in prompts(context))


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({"held_out": lambda: ()}, {}, DataError, "set haystack to a text file"),
        ({"held_out": lambda: ["  \n"]}, {}, DataError, "held-out text is empty"),
        ({}, {"haystack": "missing.txt"}, DataError, r"missing\.txt cannot be read: No such file"),
        ({}, {"lengths": (200,)}, ShapeError, "use a longer length"),
        ({}, {"needles": 90}, DataError, "held-out split has"),
    ],
)
def test_wrong_use_is_told_in_one_line(
    make_context: MakeContext, changes: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        NeedleSuite(NeedleOptions(**options)).run(make_context(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"retrieve": 2}, {"depths": [1.5]}, {"depths": []}, {"depths": 0}, {"samples": 0}, {"lenghts": [512]}]
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        NeedleOptions.model_validate(options)


@pytest.mark.parametrize(
    "options", [{}, {"depths": [0.0, 1], "lengths": [64, 256]}, {"depths": 1, "needles": 2, "retrieve": 2}]
)
def test_options_read_back_from_json(options: dict[str, Any]) -> None:
    made = NeedleOptions.model_validate(options)
    assert NeedleOptions.model_validate(made.model_dump(mode="json", exclude_none=True)) == made


def test_drawn_figures_are_svg(make_context: MakeContext) -> None:
    suite, context = NeedleSuite(SMALL), make_context()
    assert suite.draw(context.out) == {}
    suite.run(context)
    suite.run(make_context(stage="512"))
    drawn = suite.draw(context.out)
    assert list(drawn) == ["Needle retrieval: base", "Needle retrieval: 512", "Needle accuracy by length"]
    assert all(data.startswith(b"<?xml") and data.rstrip().endswith(b"</svg>") for data in drawn.values())
