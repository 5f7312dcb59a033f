"""LWM's field language: the parser, the tokens and masks of lines by hand, random picks, and mistakes with their place.

Codes are of 9 entries, two a frame: ids 259 to 267, eof 268, eov 269.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lwm_core.errors import DataError, ShapeError
from lwm_core.protocols import FeedRequest
from lwm_core.testing import DataSuite
from lwm_data.field_language import Field, FieldsError, check_fields, choose_fields, format_fields, parse_fields
from lwm_data.options import JsonlOptions

VISION = (12, 9)
BOS, EOS = 256, 257

NAMES = st.text(st.characters(exclude_characters=",[]+<>|", codec="utf-8"), min_size=1).filter(
    lambda name: name == name.strip() and "vision" not in name and name
)
FIELDS = st.one_of(
    st.builds(Field, st.lists(NAMES, min_size=1, max_size=3).map(tuple), st.just(""), st.booleans()),
    st.builds(Field, st.just(()), st.sampled_from(["bos", "eos"]), st.booleans()),
    st.builds(lambda name, learnt: Field((f"{name}vision",), "", learnt), NAMES, st.booleans()),
)


def test_lwms_own_lines() -> None:
    assert parse_fields("[instruction],[vision],answer") == (
        Field(("instruction",), learnt=False), Field(("vision",), learnt=False), Field(("answer",)),
    )  # fmt: skip
    assert parse_fields("a,[b+c],<|bos|>,<|eos|>") == (
        Field(("a",)), Field(("b", "c"), learnt=False), Field((), "bos"), Field((), "eos"),
    )  # fmt: skip
    assert parse_fields(" a b , [ c +d ] ,[<|bos|>]") == (
        Field(("a b",)), Field(("c", "d"), learnt=False), Field((), "bos", learnt=False),
    )  # fmt: skip
    assert [field.is_vision for field in parse_fields("vision,my_vision_2,text,<|eos|>")] == [True, True, False, False]


@given(st.lists(FIELDS, min_size=1, max_size=6), st.sampled_from(["", " ", "  "]))
def test_what_is_written_is_read(fields: list[Field], spaces: str) -> None:
    """Whatever the names, and with spaces around signs."""
    spec = re.sub(r"([,+\[\]])", rf"{spaces}\1{spaces}", format_fields(fields))
    if any(field.learnt for field in fields):
        assert parse_fields(spec) == tuple(fields)
    else:
        with pytest.raises(FieldsError, match="nothing is learnt"):
            parse_fields(spec)


@given(st.text(st.sampled_from(",[]+<>| abvision\té"), max_size=12) | st.text(max_size=12))
def test_any_text_is_read_or_refused_at_one_of_its_columns(spec: str) -> None:
    """Nothing else is raised; what is read is written and read as the same."""
    try:
        fields = parse_fields(spec)
    except FieldsError as error:
        assert 1 <= error.column <= len(spec) + 1 and "\n" not in str(error)
    else:
        assert parse_fields(format_fields(fields)) == fields


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", "column 1: got the end; expected the name of a field"),
        ("a,", "column 3: got the end; expected the name"),
        ("a,,b", "column 3: got ','; expected the name"),
        ("[a,b],c", r"column 3: got ','; expected '\]' for the '\[' of column 1"),
        ("a,[b", r"column 5: got the end; expected '\]' for the '\[' of column 3"),
        ("a,b]", r"column 4: got '\]'; expected ',' or the end"),
        ("[[a]],b", r"column 2: got '\['; expected the name"),
        ("a+", "column 3: got the end; expected the name"),
        ("a,<|pad|>", r"column 3: got '<\|pad\|>'; expected <\|bos\|> or <\|eos\|>"),
        ("a<|bos|>", "column 2: got '<'; expected ',' or the end"),
        ("<|bos|>+a", r"column 8: got '\+'; expected ',' or the end"),
        ("a,b+vision", "column 3: a vision field holds codes and cannot be joined"),
        ("[a],[b]", "column 1: every field stands in .* nothing is learnt"),
    ],
)
def test_mistakes_have_a_column(spec: str, words: str) -> None:
    with pytest.raises(FieldsError, match=words):
        parse_fields(spec)


def test_a_list_is_picked_from_by_seed_and_line_alone() -> None:
    specs = ["a", "b", "c"]
    picks = [choose_fields(specs, None, 3, "fields", line) for line in range(1, 301)]
    assert picks == [choose_fields(specs, None, 3, "fields", line) for line in range(1, 301)]
    assert {pick: picks.count(pick) > 70 for pick in specs} == dict.fromkeys(specs, True)
    assert picks != [choose_fields(specs, None, 4, "fields", line) for line in range(1, 301)]
    assert {choose_fields(specs, 2, seed, "fields", 1) for seed in range(9)} == {"c"}
    with pytest.raises(ValueError, match="fields_index is 3, but there are 3"):
        choose_fields(specs, 3, 0, "fields")
    with pytest.raises(ValueError, match="is empty"):
        choose_fields([], None, 0, "fields")


@pytest.fixture
def lines(tmp_path: Path, open_source: Any) -> Any:
    """``lines(records, **options)``: (ids, which are learnt, sum of weights) of each line, in order."""

    def read(records: list[Any], seed: int = 0, **options: Any) -> list[tuple[list[int], list[bool], float]]:
        (tmp_path / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        sources = {"it": {"kind": "jsonl", "path": "x.jsonl", "codes_per_frame": 2, **options}}
        source = open_source(sources, seed=seed, vision=VISION)._source("it", 1 << 20)
        built = [source.build((number,), ()) for number in range(len(records))]
        return [(one.ids.tolist(), (one.loss_weights > 0).tolist(), float(one.loss_weights.sum())) for one in built]

    return read


def told(*parts: tuple[Any, int]) -> tuple[list[int], list[bool]]:
    """Ids and mask of (bytes or ids, whether they are learnt)."""
    ids = [i for part, _ in parts for i in part]
    return ids, [bool(learnt) for part, learnt in parts for _ in part]


TWO_FRAMES = [259 + 3, 259 + 8, 268, 259 + 0, 259 + 1, 269]


def test_lwms_own_line(lines: Any) -> None:
    """Written out by hand: the delimiters and eof and eov are added, the instruction and the clip are not learnt."""
    record = {
        "instruction": "What?", "vision": [3, 8, 0, 1], "answer": "A dog.", "fields": "[instruction],[vision],answer"
    }  # fmt: skip
    ((ids, learnt, weight),) = lines([record], share=3.0)
    clip = [*b"<vision>", *TWO_FRAMES, *b"</vision>"]
    assert (ids, learnt) == told(([BOS], 0), (b"What?", 0), (clip, 0), (b"A dog.", 1), ([EOS], 1))
    assert weight == pytest.approx(3.0, rel=1e-6)


def test_joined_and_special_fields(lines: Any) -> None:
    record = {"a": "x", "b": "y", "c": "z", "my_vision": [5, 5]}
    spec = "a,[b+c],my_vision,<|eos|>,[<|bos|>],c"
    ((ids, learnt, _),) = lines([record], fields=spec, subfield_separator="::", prepend_text=">", eos=False)
    clip = [*b"<vision>", 264, 264, 269, *b"</vision>"]
    assert (ids, learnt) == told(
        ([BOS], 0), (b">x", 1), (b"y::z", 0), (clip, 1), ([EOS], 1), ([BOS], 0), (b"z", 1)
    )  # fmt: skip


def test_bos_and_eos_are_not_doubled(lines: Any) -> None:
    """LWM's own loader doubles them since its tokenizer was changed."""
    ((ids, learnt, _),) = lines([{"a": "x"}], fields="<|bos|>,a,[<|eos|>]")
    assert (ids, learnt) == told(([BOS], 0), (b"x", 1), ([EOS], 0))
    ((ids, _, _),) = lines([{"a": "x"}], fields="a", bos=False)
    assert ids == [*b"x", EOS]


def test_frames_of_a_field_are_capped_evenly(lines: Any) -> None:
    """Against NumPy's linspace."""
    codes = np.stack([np.arange(20) // 9, np.arange(20) % 9], axis=1)
    record = {"vision": codes.ravel().tolist()}
    ((ids, _, _),) = lines([record], fields="vision", max_frames=7)
    frames = np.array([i for i in ids if i >= 259]).reshape(-1, 3)
    np.testing.assert_array_equal(frames[:, :2] - 259, codes[np.linspace(0, 19, 7).astype(int)])
    assert frames[:, 2].tolist() == [268] * 6 + [269]


def test_lists_are_picked_from_alike_each_time(lines: Any) -> None:
    """Golden: which of two a line takes depends on seed and line, whether the list is its own or an option."""
    records = [{"a": "x", "b": "y"} for _ in range(16)]
    own = [{**record, "fields": ["[a],b", "[b],a"]} for record in records]
    picks = ["b" if ids[-2] == ord("y") else "a" for ids, _, _ in lines(own, seed=5)]
    assert picks == ["b" if ids[-2] == ord("y") else "a" for ids, _, _ in lines(own, seed=5)]
    assert "".join(picks) == "baaaabbbabbaabaa"
    assert lines(own, seed=5) == lines(records, seed=5, fields=["[a],b", "[b],a"])
    assert lines(own, seed=5) != lines(own, seed=6)
    assert {ids[-2] for ids, _, _ in lines(own, fields_index=0)} == {ord("y")}


def test_the_feed_packs_whole_lines(open_source: Any, tmp_path: Path) -> None:
    """Every line's tokens and weights come whole, whatever it lies beside; blank lines and files in a folder."""
    (tmp_path / "in").mkdir()
    for name in "ab":
        records = [{"q": f"{name}{i}?", "vision": [i % 9] * 4, "a": "x" * i} for i in range(1, 20)]
        text = "\n\n".join(json.dumps({**record, "fields": "[q],[vision],a"}) for record in records)
        (tmp_path / "in" / f"{name}.jsonl").write_text(text)
    sources = {"it": {"kind": "jsonl", "path": "in", "codes_per_frame": 2}}
    source = open_source(sources, vision=VISION, window_rows=12)
    alone = source._source("it", 128)
    expected = {tuple(one.ids.tolist()): one for one in (alone.build((n,), ()) for n in range(38))}
    batch = source.open(FeedRequest(0, 128, 12)).batch(0)
    seen = set()
    for b in range(12):
        for segment in range(1, batch.segment_ids[b].max() + 1):
            own = batch.segment_ids[b] == segment
            one = expected[tuple(batch.tokens[b, own].tolist())]
            np.testing.assert_array_equal(batch.loss_weights[b, own][:-1], one.loss_weights[1:])
            assert batch.loss_weights[b, own].sum() == pytest.approx(1.0, rel=1e-5)
            seen.add(one.ids.tobytes())
    assert len(seen) > 20 and batch.segment_ids.max() > 1


class TestKit(DataSuite):
    """The core's own checks of a feed."""

    @pytest.fixture(autouse=True)
    def _lines(self, tmp_path: Path, open_source: Any) -> None:
        records = [{"q": "?" * i, "a": "x" * i, "fields": ["[q],a", "q,a"]} for i in range(1, 30)]
        (tmp_path / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        sources = {"it": {"kind": "jsonl", "path": "x.jsonl"}}
        self.make = lambda seed: open_source(sources, seed=seed, window_rows=8)  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", r"x.jsonl:2: is not JSON"),
        ("[]", r"x.jsonl:2: holds a list; expected an object"),
        ('{"a": "x"}', r"x.jsonl:2: has no 'fields'; expected a string such as '\[instruction\]"),
        ('{"fields": 3}', r"x.jsonl:2: has 'fields' of int"),
        ('{"fields": []}', r"x.jsonl:2: fields: is empty"),
        ('{"fields": "a,[b"}', r"x.jsonl:2: fields: column 5: got the end; expected '\]' .* in 'a,\[b'"),
        ('{"a": "x", "fields": "a,b"}', r"x.jsonl:2: has no field 'b'; its fields are a, fields"),
        ('{"a": 3, "fields": "a"}', r"x.jsonl:2: field 'a' holds a int; expected a string"),
        ('{"a": "", "fields": "[a],a"}', r"x.jsonl:2: nothing of it is learnt"),
        ('{"vision": "x", "fields": "vision"}', r"field 'vision' holds something else than codes"),
        ('{"vision": [1, [2]], "fields": "vision"}', r"field 'vision' holds something else than codes"),
        ('{"vision": [1, 99999999999999999999], "fields": "vision"}', r"holds something else than codes"),
        ('{"vision": [1.5, 2], "fields": "vision"}', r"holds something else than codes"),
        ('{"vision": [1, 2, 3], "fields": "vision"}', r"field 'vision' holds 3 codes; expected whole frames of 2"),
        ('{"vision": [], "fields": "vision"}', r"field 'vision' holds 0 codes; expected whole frames of 2, at least"),
        ('{"vision": [1, 9], "fields": "vision"}', r"field 'vision': vision codes run from 1 to 9; expected 0 to 8"),
    ],
)
def test_wrong_lines_are_one_line_with_file_and_number(open_source: Any, tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": "x", "fields": "a"}\n' + line + "\n")
    source = open_source(
        {"it": {"kind": "jsonl", "path": "x.jsonl", "codes_per_frame": 2, "eos": False}}, vision=VISION
    )
    with pytest.raises(DataError, match=words) as caught:
        source.open(FeedRequest(0, 64, 1))
    assert "\n" not in str(caught.value) and str(caught.value).startswith("jsonl source 'it': ")


def test_vision_fields_need_a_model_with_vision(open_source: Any, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"vision": [1, 2], "fields": "vision"}\n')
    with pytest.raises(DataError, match=r"x.jsonl:1: field 'vision': .* set model.vision_size"):
        open_source({"it": {"kind": "jsonl", "path": "x.jsonl", "codes_per_frame": 2}}).open(FeedRequest(0, 64, 1))


def test_special_tokens_need_a_tokenizer_that_has_them(open_source: Any, plain_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": "x", "fields": "a,<|eos|>"}\n')
    source = open_source({"it": {"kind": "jsonl", "path": "x.jsonl"}}, tokenizer=plain_tokenizer)
    with pytest.raises(DataError, match=r"the tokenizer has no eos; leave <\|eos\|> out"):
        source.open(FeedRequest(0, 64, 1))


def test_files_that_cannot_be_used(open_source: Any, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"x.jsonl.gz is packed, but lines are read at any place; unpack it first"):
        open_source({"it": {"kind": "jsonl", "path": "x.jsonl.gz"}})
    with pytest.raises(DataError, match=r"y.jsonl does not exist"):
        open_source({"it": {"kind": "jsonl", "path": "y.jsonl"}})
    (tmp_path / "x.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"x.jsonl holds no line"):
        open_source({"it": {"kind": "jsonl", "path": "x.jsonl"}}).open(FeedRequest(0, 64, 1))


def test_a_file_that_changes_under_the_feed_is_told(open_source: Any, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": "x", "fields": "a"}\n')
    feed = open_source({"it": {"kind": "jsonl", "path": "x.jsonl"}}, prefetch=0).open(FeedRequest(0, 64, 1))
    feed.batch(0)
    (tmp_path / "x.jsonl").write_text('{"a": "xx", "fields": "a"}\n')
    with pytest.raises(DataError, match=r"x.jsonl:1: was changed while it is trained on"):
        feed.batch(1)


def test_lines_longer_than_a_row(open_source: Any, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("".join(f'{{"a": "{"x" * n}", "fields": "a"}}\n' for n in (3, 20, 9)))
    options = {"kind": "jsonl", "path": "x.jsonl"}
    with pytest.raises(
        ShapeError, match=r"x.jsonl:2 has 22 tokens, but the stage's rows have 21; use a longer seq_len"
    ):
        open_source({"it": options}).open(FeedRequest(0, 21, 1))
    open_source({"it": options}).open(FeedRequest(0, 22, 1))
    left = open_source({"it": {**options, "leave_out": ["too-long"]}})
    assert left.open(FeedRequest(0, 21, 8)).batch(0).tokens.max() > 0
    with pytest.raises(ShapeError, match="none of its lines fits a row of 4 tokens"):
        left.open(FeedRequest(0, 4, 1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fields": "a,[b"}, r"fields: column 5: got the end; expected '\]'"),
        ({"fields": ["a", "b,"]}, r"fields\[1\]: column 3: got the end"),
        ({"fields": []}, "fields: is empty"),
        ({"fields": ["a"], "fields_index": 1}, "fields_index is 1, but there are 1"),
        ({"fields": "[vision],a", "prepend_text": ">"}, "prepend_text is given, but .* begins with no text"),
        ({"codes_per_frame": 0}, "greater than or equal to 1"),
        ({"leave_out": ["no-caption"]}, "too-long"),
    ],
)
def test_wrong_options_are_told(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        JsonlOptions.model_validate({"kind": "jsonl", "path": "x.jsonl", **options})
    assert check_fields("[<|bos|>],a", "fields", ">")
