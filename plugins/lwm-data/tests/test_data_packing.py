"""Cutting, packing and sharing out, for any lengths."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_core.batch import pack_rows
from lwm_data.corpus import Corpus
from lwm_data.options import TextOptions
from lwm_data.packing import best_fit, cut, pack_whole, share_out
from lwm_data.sources.text import TextSource

LENGTHS = st.lists(st.integers(1, 200), min_size=1, max_size=40)


def corpus_of(lengths: list[int]) -> Corpus:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Corpus(np.arange(offsets[-1], dtype=np.int32), offsets)


@given(LENGTHS, st.integers(2, 64), st.integers(0, 2**32))
def test_cut_puts_every_token_in_one_piece_in_order(lengths, seq_len, seed):
    offsets = corpus_of(lengths).offsets
    pieces = cut(offsets, seq_len, np.random.default_rng(seed))
    assert pieces[0, 0] == 0 and pieces[-1, 1] == offsets[-1]
    np.testing.assert_array_equal(pieces[1:, 0], pieces[:-1, 1])
    sizes = pieces[:, 1] - pieces[:, 0]
    assert sizes.min() >= 1 and sizes.max() <= seq_len
    # No piece spans two documents, a document that fits is whole, and only a document's ends are remainders.
    assert set(offsets.tolist()) <= {0, *pieces[:, 1].tolist()}
    for start, end in itertools.pairwise(offsets):
        own = sizes[(pieces[:, 0] >= start) & (pieces[:, 1] <= end)]
        assert len(own) == 1 if end - start <= seq_len else np.all(own[1:-1] == seq_len)


def test_cut_begins_at_every_place_of_a_long_document():
    random = np.random.default_rng(0)
    firsts = {int(cut(np.array([0, 100]), 8, random)[0, 1]) for _ in range(500)}
    assert firsts == set(range(1, 9))


@given(LENGTHS, st.integers(1, 12), st.integers(2, 64))
def test_best_fit_never_overfills_repeats_or_reorders(lengths, rows, seq_len):
    lengths = [min(length, seq_len) for length in lengths]
    packed = best_fit(lengths, rows, seq_len)
    assert len(packed) == rows
    assert all(sum(lengths[i] for i in row) <= seq_len for row in packed)
    assert all(row == sorted(row) for row in packed)
    placed = [i for row in packed for i in row]
    assert len(placed) == len(set(placed))


@given(LENGTHS, st.integers(2, 64))
def test_best_fit_places_everything_where_there_are_rows_enough(lengths, seq_len):
    lengths = [min(length, seq_len) for length in lengths]
    assert sorted(i for row in best_fit(lengths, len(lengths), seq_len) for i in row) == list(range(len(lengths)))


def test_best_fit_takes_the_row_with_the_least_room_left():
    # Rows of 10: 7 and 5 are open when 3 comes; it fills the first exactly.
    assert best_fit([7, 5, 3, 5], 2, 10) == [[0, 2], [1, 3]]


def test_short_documents_fill_their_rows():
    random = np.random.default_rng(0)
    lengths = iter(lambda: int(random.integers(5, 60)), None)
    drawn: list[int] = []
    packed = best_fit((drawn.append(n) or n for n in lengths), 64, 256)
    assert sum(drawn[i] for row in packed for i in row) / (64 * 256) > 0.98


@given(LENGTHS, st.integers(1, 12), st.integers(2, 64))
def test_whole_pieces_are_the_first_so_many(lengths, rows, seq_len):
    """No row is too long, in no row do pieces change places, and all pieces before the last that went in went in."""
    lengths = [min(length, seq_len) for length in lengths]
    packed = pack_whole(lengths, rows, seq_len)
    assert len(packed) == rows
    assert all(sum(lengths[i] for i in row) <= seq_len and row == sorted(row) for row in packed)
    placed = sorted(i for row in packed for i in row)
    assert placed == list(range(len(placed)))
    assert len(placed) >= min(rows, len(lengths)), "a row each is always room enough"


def test_whole_pieces_fill_their_rows():
    """Long and short pieces, half and half, where a row holds one of each."""
    lengths = np.random.default_rng(0).choice([89, 30], size=2000).tolist()
    packed = pack_whole(lengths, 500, 120)
    assert sum(lengths[i] for row in packed for i in row) > 0.98 * 500 * 119


def test_whole_pieces_keep_the_mix_of_long_and_short():
    """Seven of ten are long, and a row holds one of them: short ones alone could still go in, and do not."""
    lengths = np.random.default_rng(0).choice([89, 30], size=2000, p=[0.7, 0.3]).tolist()

    def long(packed):
        taken = [lengths[i] for row in packed for i in row]
        return taken.count(89) / len(taken)

    assert long(pack_whole(lengths, 500, 120)) == pytest.approx(0.7, abs=0.03)
    assert long(best_fit(lengths, 500, 120)) < 0.6


@given(st.dictionaries(st.text(min_size=1), st.floats(0.01, 10), min_size=1, max_size=5), st.integers(1, 50))
def test_shares_are_exact_but_for_rounding(weights, rows):
    names = share_out(weights, rows, np.random.default_rng(0))
    total = sum(weights.values())
    for name, weight in weights.items():
        # Each source's interval of the unit line holds its share of evenly spaced points, give or take one.
        assert abs(names.count(name) - rows * weight / total) < 1 + 1e-6


def test_shares_are_exact_in_the_mean():
    random = np.random.default_rng(0)
    weights = {"a": 0.9, "b": 0.07, "c": 0.03}
    names = [name for _ in range(3000) for name in share_out(weights, 7, random)]
    for name, weight in weights.items():
        assert names.count(name) / len(names) == pytest.approx(weight, abs=0.005)


@given(LENGTHS, st.integers(2, 64), st.integers(0, 2**32), st.sampled_from([0.5, 1.0, 3.0]))
def test_packed_documents_are_whole_contiguous_and_weigh_their_share(lengths, seq_len, seed, share):
    """The whole way of a text source: tokens are their own addresses, so that each can be followed."""
    corpus = corpus_of(lengths)
    source = TextSource(TextOptions(kind="text", corpus="kjv", share=share), corpus, seq_len)
    key = (seed, 0, 0, 1)
    rows = source.plan(4, key)
    batch = pack_rows([[source.build(item, key) for item in row] for row in rows], seq_len)
    assert np.all(batch.segment_ids[:, 0] == 1), "no row is empty"
    for b in range(4):
        for segment in range(1, batch.segment_ids[b].max() + 1):
            (places,) = np.nonzero(batch.segment_ids[b] == segment)
            np.testing.assert_array_equal(places, np.arange(places[0], places[-1] + 1))
            ids = batch.tokens[b, places]
            np.testing.assert_array_equal(ids, np.arange(ids[0], ids[0] + len(ids)))
            np.testing.assert_array_equal(batch.positions[b, places], np.arange(len(ids)))
            document = np.searchsorted(corpus.offsets, ids[0], side="right") - 1
            assert ids[-1] < corpus.offsets[document + 1], "a segment lies in one document"
            np.testing.assert_array_equal(batch.targets[b, places[:-1]], ids[1:])
            length = lengths[document]
            part = 1.0 if length <= seq_len else (len(ids) - 1) / (seq_len - 1)
            expected = share * part if len(ids) > 1 else 0.0
            assert batch.loss_weights[b, places].sum() == pytest.approx(expected, rel=1e-5)
            assert batch.loss_weights[b, places[-1]] == 0


@given(LENGTHS, st.integers(2, 64))
def test_weighed_by_token_every_target_weighs_the_same(lengths, seq_len):
    source = TextSource(TextOptions(kind="text", corpus="kjv", weigh="token"), corpus_of(lengths), seq_len)
    key = (0, 0, 0, 1)
    weights = [w for row in source.plan(4, key) for item in row for w in source.build(item, key).loss_weights[1:]]
    np.testing.assert_allclose(weights, 1 / (seq_len - 1), rtol=1e-6)


def test_a_window_repeats_nothing_until_it_has_taken_the_whole_corpus():
    source = TextSource(TextOptions(kind="text", corpus="kjv"), corpus_of([10] * 60), 20)
    starts = sorted(int(item[0]) for row in source.plan(30, (0, 0, 0, 1)) for item in row)
    assert starts == list(range(0, 600, 10))
