"""Needles: the splits share nothing, texts are LWM's, and planting keeps every token."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_core.errors import DataError
from lwm_core.needles import CITIES, Needle, answer, cities, draw_needles, draw_number, plant, question


def test_the_splits_share_no_city() -> None:
    train, held_out = cities("train"), cities("held-out")
    assert not set(train) & set(held_out)
    assert set(train) | set(held_out) == set(CITIES)
    assert len(set(CITIES)) == len(CITIES) == len(train) + len(held_out)
    assert len(held_out) >= 50


@given(st.integers(0, 10_000))
def test_the_splits_share_no_number(seed: int) -> None:
    random = np.random.default_rng(seed)
    for split, held_out in (("train", False), ("held-out", True)):
        number = draw_number(random, split)  # type: ignore[arg-type]
        assert re.fullmatch(r"[1-9]\d{6}", number)
        assert (int(number) % 7 == 0) == held_out


@given(st.integers(0, 1000), st.integers(1, 12), st.sampled_from(["train", "held-out"]))
def test_needles_differ(seed: int, count: int, split: str) -> None:
    needles = draw_needles(np.random.default_rng(seed), count, split)  # type: ignore[arg-type]
    assert len({needle.city for needle in needles}) == len({needle.number for needle in needles}) == count
    assert {needle.city for needle in needles} <= set(cities(split))  # type: ignore[arg-type]
    again = draw_needles(np.random.default_rng(seed), count, split)  # type: ignore[arg-type]
    assert needles == again


def test_more_needles_than_cities_are_refused() -> None:
    with pytest.raises(DataError, match="held-out"):
        draw_needles(np.random.default_rng(0), len(cities("held-out")) + 1, "held-out")


def test_the_texts() -> None:
    oslo, rome, lima = Needle("Oslo", "1234567"), Needle("Rome", "7654321"), Needle("Lima", "1111111")
    assert oslo.text == "\nThe special magic Oslo number is: 1234567\n"
    assert question([oslo]) == " What is the special magic Oslo number?"
    assert question([oslo, rome, lima]) == " What are the special magic numbers for Oslo, Rome and Lima?"
    assert answer([oslo]) == " 1234567"
    assert answer([oslo, rome]) == " Oslo: 1234567, Rome: 7654321"


END = 7


@given(
    st.lists(st.sampled_from([1, 2, 3, END]), max_size=60),
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 4)), max_size=4),
)
def test_planting_keeps_every_token(haystack: list[int], spots: list[tuple[float, int]]) -> None:
    needles = [(depth, [100 + i] * n) for i, (depth, n) in enumerate(spots)]
    planted = plant(haystack, needles, frozenset({END}))
    assert [token for token in planted if token < 100] == haystack
    for depth, ids in needles:
        at = planted.index(ids[0])
        assert planted[at : at + len(ids)] == ids, "a needle is in one piece"
        before = [token for token in planted[:at] if token < 100]
        wanted = round(depth * len(haystack))
        assert len(before) <= wanted
        if len(before) < wanted:
            assert before[-1] == END and END not in haystack[len(before) : wanted]
        elif before and before[-1] != END:
            assert END not in haystack[:wanted], "it goes back to a sentence's end where there is one"


def test_needles_lie_in_the_order_of_their_depths() -> None:
    planted = plant([1] * 10, [(0.9, [100]), (0.1, [101]), (0.5, [102])], frozenset())
    assert [token for token in planted if token >= 100] == [101, 102, 100]
    assert plant([1, 2], [(0.0, [100]), (1.0, [101])], frozenset()) == [100, 1, 2, 101]
