"""The prompt that training and evaluation share: its layout, and the length that is known before it is built."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_core.builtins.byte_tokens import BytesTokenizer
from lwm_core.errors import ShapeError
from lwm_core.needles import (
    PROMPT_END,
    PROMPT_START,
    answer_ids,
    build_prompt,
    draw_needles,
    fit_haystack,
    question,
    sentence_ends,
)

TOKENIZER = BytesTokenizer()
TEXT = "And it came to pass. So it was.\nThen they went forth! " * 60


@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(900, 2000), st.sampled_from([None, 256]))
def test_a_prompt_is_as_long_as_its_haystack_was_fitted_for(seed, count, length, bos):
    random = np.random.default_rng(seed)
    needles = draw_needles(random, count, "train")
    asked = needles[: 1 + count // 2]
    room = fit_haystack(length, needles, asked, TOKENIZER.encode, bos)
    ends = sentence_ends(TOKENIZER.decode, TOKENIZER.size)
    placed = list(zip(random.random(count).tolist(), needles, strict=True))
    ids = build_prompt(TOKENIZER.encode(TEXT)[:room], placed, asked, TOKENIZER.encode, ends, bos)
    assert len(ids) == length
    said = TOKENIZER.decode(ids)
    assert said.startswith(PROMPT_START) and said.endswith(question(asked) + PROMPT_END)
    assert (ids[0] == bos) is (bos is not None)
    for needle in needles:
        assert said.count(needle.text) == 1
        said = said.replace(needle.text, "")
    assert said == PROMPT_START + TEXT[:room] + question(asked) + PROMPT_END


def test_a_needle_stands_after_a_sentence_end():
    (needle,) = draw_needles(np.random.default_rng(0), 1, "held-out")
    ends = sentence_ends(TOKENIZER.decode, TOKENIZER.size)
    said = TOKENIZER.decode(build_prompt(TOKENIZER.encode(TEXT), [(0.5, needle)], [needle], TOKENIZER.encode, ends))
    assert said[: said.index(needle.text)][-1] in ".!\n"


def test_sentence_ends_are_the_ids_whose_text_ends_one():
    assert sentence_ends(TOKENIZER.decode, TOKENIZER.size) == {ord(mark) for mark in ".!?\n"}


def test_the_answer_ends_with_eos_where_there_is_one():
    (needle,) = draw_needles(np.random.default_rng(0), 1, "train")
    ids = TOKENIZER.encode(f" {needle.number}")
    assert answer_ids([needle], TOKENIZER.encode) == ids
    assert answer_ids([needle], TOKENIZER.encode, 257) == [*ids, 257]


def test_a_length_without_room_is_refused_with_what_is_needed():
    needles = draw_needles(np.random.default_rng(0), 3, "train")
    need = 5000 - fit_haystack(5000, needles, needles[:1], TOKENIZER.encode)
    assert fit_haystack(need, needles, needles[:1], TOKENIZER.encode) == 0
    with pytest.raises(ShapeError, match=f"3 needle.* alone need {need}"):
        fit_haystack(need - 1, needles, needles[:1], TOKENIZER.encode)
