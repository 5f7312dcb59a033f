"""What each source teaches: which tokens are learnt, and what never appears."""

from __future__ import annotations

import re

import numpy as np
import pytest
from pydantic import ValidationError

from lwm_core.errors import DataError, ShapeError
from lwm_core.needles import PROMPT_END, PROMPT_START, cities
from lwm_core.protocols import FeedRequest

KJV = {"kind": "text", "corpus": "kjv"}
NEEDLE = {"kind": "needle", "haystack": "kjv"}
FACT = re.compile(r"\nThe special magic (\w+) number is: (\d{7})\n")
QUESTION = re.compile(r" What (?:is|are) the special magic ")


def examples(batch):
    """(ids, ids that are learnt, weights) of every segment."""
    for b in range(batch.shape[0]):
        for segment in range(1, batch.segment_ids[b].max() + 1):
            own = batch.segment_ids[b] == segment
            weights = batch.loss_weights[b, own]
            yield batch.tokens[b, own], batch.targets[b, own][weights > 0], weights


def feed(source, seq_len, rows, mix, **request):
    return source.open(FeedRequest(0, seq_len, rows, mix=mix, **request)).batch(0)


def test_text_rows_of_a_long_book_are_real_spans_of_it(open_source, tokenizer):
    source = open_source({"kjv": KJV})
    train = source._read("kjv").train[0]
    batch = feed(source, 300, 16, None)
    assert batch.segment_ids.min() == 1
    for ids, _, _ in examples(batch):
        assert tokenizer.decode(ids.tolist()) in train


def test_documents_begin_with_bos_and_end_with_eos_where_the_tokenizer_has_them(
    open_source, tokenizer, plain_tokenizer, tmp_path
):
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(99)))
    sources = {"it": {"kind": "text", "path": "a.txt", "split": "line"}}
    for used, ends in ((tokenizer, True), (plain_tokenizer, False)):
        for ids, _, _ in examples(feed(open_source(sources, tokenizer=used), 64, 4, None)):
            assert bool(ids[0] == 256 and ids[-1] == 257) is ends
            assert re.fullmatch(r"line \d+\n", used.decode(ids.tolist()))


def test_long_documents_are_encoded_in_chunks_of_whole_lines(open_source, monkeypatch, tokenizer):
    import lwm_data.corpus as corpus

    monkeypatch.setattr(corpus, "CHUNK", 10)
    made = corpus.encode_corpus(["ab\n" * 20 + "tail without an end", "x"], tokenizer, "it")
    assert tokenizer.decode(made.tokens.tolist()) == "ab\n" * 20 + "tail without an endx"
    assert list(corpus._chunks("ab\n" * 5)) == ["ab\n" * 4, "ab\n"]
    assert made.offsets.tolist() == [0, 81, 84]


def test_a_span_past_the_end_is_read_round_again():
    from lwm_data.corpus import Corpus

    corpus = Corpus(np.arange(5, dtype=np.int32), np.array([0, 5]))
    assert corpus.span(3, 12).tolist() == [3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4]


def test_held_out_text_is_never_trained_on(open_source, tmp_path):
    lines = "".join(f"<{i:05d}>" + "x" * 20 + "\n" for i in range(1000))
    (tmp_path / "a.txt").write_text(lines)
    source = open_source({
        "text": {"kind": "text", "path": "a.txt"},
        "needle": {"kind": "needle", "haystack": "text"},
        "copy": {"kind": "copy", "text": "text", "min_period": 60},
    }, window_rows=30)  # fmt: skip
    (held_out,) = source.held_out()
    forbidden = set(re.findall(r"<\d{5}>", held_out))
    assert len(forbidden) == 100
    seen = set()
    for step in range(3):
        tokens = source.open(FeedRequest(0, 600, 30)).batch(step).tokens
        for row in tokens:
            seen |= set(re.findall(r"<\d{5}>", bytes(int(i) for i in row if i < 256).decode()))
    assert len(seen) > 500
    assert not seen & forbidden


@pytest.mark.parametrize("turns", [1, 3])
def test_needle_rows_hold_the_task_and_only_the_answers_are_learnt(open_source, tokenizer, turns):
    options = {**NEEDLE, "needles": [1, 4], "retrieve": [1, 2], "turns": turns, "share": 2.0}
    source = open_source({"kjv": KJV, "needle": options})
    train = source._read("kjv").train[0]
    planted_counts, answers_seen, depths = set(), set(), []
    batch = feed(source, 1500, 40, {"needle": 1.0})
    assert batch.segment_ids.min() == 1, "a row is filled exactly"
    for ids, learnt, weights in examples(batch):
        said = tokenizer.decode(ids.tolist())
        assert ids[0] == 256 and said.startswith(PROMPT_START) and said.count(PROMPT_END) == turns
        facts = dict(FACT.findall(said))
        planted_counts.add(len(facts))
        context = said[len(PROMPT_START) : QUESTION.search(said).start()]
        depths.append(FACT.search(context).start() / len(context))
        if len(facts) == 1:
            assert FACT.sub("", context) in train
        answers = tokenizer.decode(learnt.tolist())
        numbers = re.findall(r"\d{7}", answers)
        assert numbers and set(numbers) <= set(facts.values())
        for city, number in re.findall(r"(\w+): (\d{7})", answers):
            assert facts[city] == number
        # What is learnt is exactly what stands behind each ASSISTANT:, the eos included.
        tail = said.split(PROMPT_END)
        replies = [QUESTION.split(part)[0] for part in tail[1:]]
        assert answers == "".join(replies)
        assert list(learnt).count(257) == turns
        assert weights.sum() == pytest.approx(2.0, rel=1e-5)
        assert len(set(weights[weights > 0].tolist())) == 1
        answers_seen.add(answers)
    assert planted_counts == {1, 4}
    assert len(answers_seen) == 40
    assert min(depths) < 0.2 and max(depths) > 0.5


def test_needle_lengths_are_uniform_and_packed_where_a_shortest_is_given(open_source):
    source = open_source({"kjv": KJV, "needle": {**NEEDLE, "min_tokens": 400}}, window_rows=64)
    lengths = [len(ids) for ids, _, _ in examples(feed(source, 2000, 64, {"needle": 1.0}))]
    assert 400 <= min(lengths) < 500 and 1500 < max(lengths) <= 2000
    assert len(lengths) > 64


@pytest.mark.parametrize("shortest", [None, 400])
def test_needle_lengths_end_where_a_longest_is_given(open_source, shortest):
    least = {"min_tokens": shortest} if shortest else {}
    source = open_source({"kjv": KJV, "needle": {**NEEDLE, **least, "max_tokens": 500}}, window_rows=64)
    lengths = [len(ids) for ids, _, _ in examples(feed(source, 2000, 64, {"needle": 1.0}))]
    assert max(lengths) == 500 and min(lengths) <= (shortest or 500) + 10 and len(lengths) >= 4 * 64
    assert lengths == [500] * len(lengths) or shortest
    in_short_rows = feed(source, 450, 64, {"needle": 1.0})
    assert 440 < max(len(ids) for ids, _, _ in examples(in_short_rows)) <= 450


@pytest.mark.parametrize("task", ["repeat", "pairs"])
def test_copies_end_where_a_longest_is_given(open_source, task):
    source = open_source({"copy": {"kind": "copy", "task": task, "min_tokens": 40, "max_tokens": 64}})
    lengths = [len(ids) for ids, _, _ in examples(feed(source, 256, 64, None))]
    assert 50 < max(lengths) <= 64 and len(lengths) >= 4 * 64


def test_a_longest_below_the_shortest_or_below_the_needles_is_refused(open_source):
    with pytest.raises(ValidationError, match="min_tokens 400 is above max_tokens 300"):
        open_source({"kjv": KJV, "needle": {**NEEDLE, "min_tokens": 400, "max_tokens": 300}})
    with pytest.raises(ShapeError, match="but an example has 256; use a larger max_tokens"):
        source = {**NEEDLE, "needles": [4], "retrieve": [4], "max_tokens": 256}
        feed(open_source({"kjv": KJV, "needle": source}), 2000, 2, {"needle": 1.0})


def test_no_held_out_city_or_number_is_trained_on(open_source, tokenizer):
    sources = {
        "kjv": KJV,
        "needle": {**NEEDLE, "needles": [8], "retrieve": [2]},
        "pairs": {"kind": "copy", "task": "pairs", "key_digits": 7, "value_digits": 7},
    }
    source = open_source(sources)
    batch = feed(source, 1200, 120, {"needle": 1.0, "pairs": 1.0})
    held_out = set(cities("held-out"))
    numbers, facts = set(), 0
    for ids, _, _ in examples(batch):
        said = tokenizer.decode(ids.tolist())
        facts += len(FACT.findall(said))
        assert not held_out & {city for city, _ in FACT.findall(said)}
        numbers |= set(re.findall(r"\d{7}", said))
    assert facts > 300 and len(numbers) > 2000
    assert not [number for number in numbers if int(number) % 7 == 0]


def test_a_row_too_short_for_the_needles_is_refused_with_what_it_needs(open_source):
    source = open_source({"kjv": KJV, "needle": {**NEEDLE, "needles": [4], "retrieve": [4]}})
    with pytest.raises(ShapeError, match=r"needle source 'needle': 4 needle.* need (\d+) .* have 256") as caught:
        feed(source, 256, 2, {"needle": 1.0})
    need = int(re.search(r"need (\d+)", str(caught.value)).group(1))
    feed(source, need, 256, {"needle": 1.0})
    with pytest.raises(ShapeError, match=f"need {need} tokens"):
        feed(source, need - 1, 2, {"needle": 1.0})


def test_a_shortest_needle_longer_than_the_row_is_refused(open_source):
    source = open_source({"kjv": KJV, "needle": {**NEEDLE, "min_tokens": 3000}})
    with pytest.raises(ShapeError, match="min_tokens is 3000, but the stage's rows have 2000"):
        feed(source, 2000, 2, {"needle": 1.0})


def test_more_needles_than_cities_are_refused(open_source):
    with pytest.raises(DataError, match="1000 needles are asked for"):
        feed(open_source({"kjv": KJV, "needle": {**NEEDLE, "needles": [1000]}}), 1 << 20, 1, {"needle": 1.0})


@pytest.mark.parametrize("text", [None, "kjv"])
def test_what_a_repeat_learns_can_be_known(open_source, text):
    """Every learnt token follows a span that stood before, and is what followed it there."""
    options = {"kind": "copy", "min_period": 8, "max_period": 40, **({"text": text} if text else {})}
    batch = feed(open_source({"kjv": KJV, "copy": options}), 200, 64, {"copy": 1.0})
    gaps = 0
    for ids, learnt, weights in examples(batch):
        assert weights.sum() == pytest.approx(1.0, rel=1e-5)
        places = np.flatnonzero(weights) + 1
        gaps += bool(np.any(np.diff(places) > 2))
        matches = [p for p in range(8, 41) if np.array_equal(ids[:p][1:], learnt[: p - 1])]
        assert matches, "the first repeat's learnt tokens are the span but for its first token"
        assert text is not None or not set(ids.tolist()) & {256, 257, 258}
    assert 10 < gaps < 54


def test_repeat_periods_vary(open_source):
    batch = feed(open_source({"copy": {"kind": "copy", "min_period": 4}}), 256, 64, None)
    firsts = [int(np.flatnonzero(weights)[0]) for _, _, weights in examples(batch)]
    assert min(firsts) < 10 and max(firsts) > 60


def test_pairs_learn_the_values_of_keys_that_come_again(open_source, tokenizer):
    options = {"kind": "copy", "task": "pairs", "key_digits": 2, "value_digits": 5}
    batch = feed(open_source({"copy": options}), 400, 32, None)
    for ids, learnt, weights in examples(batch):
        lines = re.findall(r"(\d\d): (\d{5})\n", tokenizer.decode(ids.tolist()))
        assert "".join(f"{key}: {value}\n" for key, value in lines) == tokenizer.decode(ids.tolist())
        known: dict[str, str] = {}
        while lines and lines[0][0] not in known:
            known.update([lines.pop(0)])
        assert len(known) >= 20 and len(lines) >= 20
        assert all(known[key] == value for key, value in lines)
        assert tokenizer.decode(learnt.tolist()) == "".join(value for _, value in lines)
        assert {key for key, _ in lines[: len(known)]} == set(known)
        assert weights.sum() == pytest.approx(1.0, rel=1e-5)


def test_few_keys_do_not_end_in_a_loop(open_source, tokenizer):
    options = {"kind": "copy", "task": "pairs", "key_digits": 1, "value_digits": 1}
    (first, *_) = examples(feed(open_source({"copy": options}), 500, 1, None))
    assert len(set(re.findall(r"(\d): ", tokenizer.decode(first[0].tolist())))) == 5


@pytest.mark.parametrize("task", ["repeat", "pairs"])
def test_a_row_too_short_for_copying_is_refused(open_source, task):
    with pytest.raises(ShapeError, match=r"copy source 'copy': a .* need \d+ tokens"):
        feed(open_source({"copy": {"kind": "copy", "task": task, "min_period": 9}}), 16, 2, None)
    with pytest.raises(ShapeError, match="max_tokens is 9, and"):
        feed(open_source({"copy": {"kind": "copy", "task": task, "min_period": 9, "max_tokens": 9}}), 64, 2, None)
    with pytest.raises(ShapeError, match="min_tokens is 99"):
        feed(open_source({"copy": {"kind": "copy", "task": task, "min_tokens": 99}}), 64, 2, None)


def test_random_lengths_of_copies_are_packed(open_source):
    batch = feed(open_source({"copy": {"kind": "copy", "min_tokens": 20}}), 256, 64, None)
    assert batch.segment_ids.max() > 1
    assert all(weights.sum() == pytest.approx(1.0, rel=1e-5) for _, _, weights in examples(batch))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sources": {}}, "at least 1"),
        ({"sources": {"a": {"kind": "txt", "path": "x"}}}, "'text'"),
        ({"sources": {"a": {"kind": "text"}}}, "either path or corpus"),
        ({"sources": {"a": {**KJV, "path": "x"}}}, "either path or corpus"),
        ({"sources": {"a": {**KJV, "held_out": 1.0}}}, "less than 1"),
        ({"sources": {"a": {**KJV, "colour": 1}}}, "not permitted"),
        ({"sources": {"kjv": KJV, "n": {"kind": "needle", "haystack": "kvj"}}}, "did you mean 'kjv'"),
        ({"sources": {"kjv": KJV, "c": {"kind": "copy", "text": "c"}}}, "no text source 'c'"),
        ({"sources": {"kjv": KJV, "n": {**NEEDLE, "retrieve": [2]}}}, "only 1 may be planted"),
        ({"sources": {"kjv": KJV, "n": {**NEEDLE, "needles": [0]}}}, "numbers from 1"),
        ({"sources": {"c": {"kind": "copy", "min_period": 9, "max_period": 8}}}, "below min_period"),
        ({"sources": {"kjv": KJV, "c": {"kind": "copy", "task": "pairs", "text": "kjv"}}}, "option of task 'repeat'"),
        ({"sources": {"kjv": KJV}, "weights": {"kvj": 1.0}}, "did you mean 'kjv'"),
        ({"sources": {"kjv": KJV}, "weights": {"kjv": 0.0}}, "every weight is 0"),
        ({"sources": {"kjv": KJV}, "weights": {"kjv": -1.0}}, "weight of 'kjv' is -1.0"),
    ],
)
def test_wrong_options_are_told(options, words):
    from lwm_data.options import MixOptions

    with pytest.raises(ValidationError, match=words):
        MixOptions.model_validate(options)
