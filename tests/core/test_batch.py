"""Examples and packed batches: every field of every token against a loop over documents."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_core.batch import PackedBatch, TokenSequence, pack_rows
from lwm_core.errors import ShapeError
from lwm_core.testing.data_suite import check_packed

SEQ_LEN = 24


def example(n: int, seed: int = 0) -> TokenSequence:
    random = np.random.default_rng((n, seed))
    return TokenSequence(random.integers(1, 99, n), random.random(n))  # type: ignore[arg-type]


@st.composite
def rows(draw: st.DrawFn) -> list[list[TokenSequence]]:
    found = []
    for b in range(draw(st.integers(1, 3))):
        lengths, left = [], SEQ_LEN
        while left and draw(st.booleans()):
            lengths.append(draw(st.integers(1, left)))
            left -= lengths[-1]
        found.append([example(n, 10 * b + i) for i, n in enumerate(lengths)])
    return found


@given(rows())
def test_packing_token_by_token(given_rows: list[list[TokenSequence]]) -> None:
    batch = pack_rows(given_rows, SEQ_LEN)
    assert batch.shape == (len(given_rows), SEQ_LEN)
    for b, examples in enumerate(given_rows):
        expected: list[tuple[int, int, int, int, float]] = []
        for number, document in enumerate(examples, start=1):
            ids, weights = document.ids.tolist(), document.loss_weights.tolist()
            for i, token in enumerate(ids):
                last = i + 1 == len(ids)
                expected.append((token, 0 if last else ids[i + 1], number, i, 0.0 if last else weights[i + 1]))
        expected += [(0, 0, 0, 0, 0.0)] * (SEQ_LEN - len(expected))
        columns = (batch.tokens, batch.targets, batch.segment_ids, batch.positions, batch.loss_weights)
        assert list(zip(*(column[b].tolist() for column in columns), strict=True)) == expected
    check_packed(batch)


@given(rows(), st.integers(0, 10))
def test_map_permutes_every_array_alike(given_rows: list[list[TokenSequence]], seed: int) -> None:
    batch = pack_rows(given_rows, SEQ_LEN)
    order = np.random.default_rng(seed).permutation(SEQ_LEN)
    permuted = batch.map(lambda array: array[:, order])
    assert np.array_equal(permuted.tokens, batch.tokens[:, order])
    assert np.array_equal(permuted.loss_weights, batch.loss_weights[:, order])
    assert np.array_equal(permuted.map(lambda array: array[:, np.argsort(order)]).targets, batch.targets)


def test_an_examples_weights_sum_to_its_share() -> None:
    """All but the first token's weight survive: nothing predicts the first."""
    batch = pack_rows([[example(5), example(7)]], SEQ_LEN)
    kept = example(5).loss_weights[1:].sum() + example(7).loss_weights[1:].sum()
    assert batch.loss_weights.sum() == pytest.approx(kept)


def test_too_long_or_empty_examples_are_refused() -> None:
    assert pack_rows([[example(SEQ_LEN)]], SEQ_LEN).segment_ids.all()
    with pytest.raises(ShapeError, match="row 1, example 2 has 20 tokens and ends at 25"):
        pack_rows([[], [example(5), example(20)]], SEQ_LEN)
    with pytest.raises(ShapeError, match="has 0 tokens"):
        pack_rows([[TokenSequence(np.array([]), np.array([]))]], SEQ_LEN)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ids", "weights", "told"),
    [
        ([1, 2], [1.0], "one length"),
        ([[1]], [[1.0]], "one dimension"),
        ([1], [-0.5], "not negative"),
        ([1], [float("nan")], "finite"),
        ([1], [float("inf")], "finite"),
    ],
)
def test_wrong_sequences_are_refused(ids: list[int], weights: list[float], told: str) -> None:
    with pytest.raises(ShapeError, match=told):
        TokenSequence(np.array(ids), np.array(weights))  # type: ignore[arg-type]


def test_records_are_frozen_copies() -> None:
    ids = np.array([1, 2, 3], np.int32)
    sequence = TokenSequence(ids, np.ones(3, np.float32))
    ids[0] = 9
    assert sequence.ids.tolist() == [1, 2, 3] and len(sequence) == 3
    with pytest.raises(ValueError, match="read-only"):
        sequence.ids[0] = 9
    with pytest.raises(ValueError, match="read-only"):
        pack_rows([[sequence]], 4).tokens[0, 0] = 9
    with pytest.raises(AttributeError):
        sequence.ids = ids  # type: ignore[misc]


def test_wrong_batches_are_refused() -> None:
    good = np.ones((1, 4), np.int32)
    with pytest.raises(ShapeError, match="one shape"):
        PackedBatch(good, good, good, good[:, :3], good.astype(np.float32))
    with pytest.raises(ShapeError, match="one shape"):
        PackedBatch(*[good[0]] * 4, good[0].astype(np.float32))
    with pytest.raises(ShapeError, match="padding"):
        PackedBatch(good, good, np.zeros_like(good), good, good.astype(np.float32))
