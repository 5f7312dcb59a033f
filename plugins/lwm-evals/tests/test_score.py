"""The numbers of ``lwm score`` against hand-made ones, and its figure."""

from __future__ import annotations

from itertools import pairwise
from math import exp, log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_evals.figures import perplexity_by_position, standalone
from lwm_evals.score import edges, score, table


@given(st.integers(2, 3_000_000))
def test_bands_cover_every_position_once(tokens: int) -> None:
    """In order, from the first predicted token to the last; none but the last much shorter than what is before it."""
    cuts = edges(tokens)
    assert cuts[0] == 1 and cuts[-1] == tokens
    sizes = np.diff(cuts)
    assert (sizes > 0).all()
    assert all(2 * size >= before for before, size in pairwise(sizes))
    assert len(cuts) < 20


def test_numbers_by_hand() -> None:
    """Two halves of a text: the first at 1 nat a token, the second at 2."""
    likelihoods = -np.concatenate([np.full(63, 1.0), np.full(64, 2.0)]).astype(np.float32)
    found = score(likelihoods, 400)
    assert [(band.start, band.stop) for band in found.bands] == [(1, 64), (64, 128)]
    assert [band.perplexity for band in found.bands] == pytest.approx([exp(1), exp(2)])
    assert found.tokens == 128
    assert found.nats == pytest.approx((63 + 128) / 127)
    assert found.bits_per_byte == pytest.approx((63 + 128) / log(2) / 400)
    rows = table(found)
    assert [row[:2] for row in rows] == [("1-63", "2.72"), ("64-127", "7.39")]
    assert len(rows[0][2]) == 16 and len(rows[1][2]) == 32


def test_an_impossible_token_is_told_as_such() -> None:
    likelihoods = np.full(100, -1.0, np.float32)
    likelihoods[80] = -np.inf
    found = score(likelihoods, 100)
    assert found.perplexity == float("inf") and found.bands[0].perplexity == pytest.approx(exp(1))
    assert table(found)[-1][1] == "inf"
    assert standalone(perplexity_by_position(found, 50)).startswith(b"<?xml")


def test_too_short_a_text_has_no_bands() -> None:
    with pytest.raises(ValueError, match="1 tokens have no position to predict"):
        edges(1)


@pytest.mark.parametrize(("rise", "scale"), [(1.0, "linear"), (2.0, "linear"), (2.5, "log")])
def test_a_perplexity_that_rises_tenfold_is_drawn_over_a_logarithmic_axis(rise: float, scale: str) -> None:
    """e² is less than 10, e^2.5 more; every band is within the axis."""
    found = score(-1.0 - rise * (np.arange(4095) >= 2047), 100)
    [axes] = perplexity_by_position(found, 2048).axes
    assert axes.get_yscale() == scale
    low, high = axes.get_ylim()
    assert all(low < band.perplexity < high for band in found.bands)
