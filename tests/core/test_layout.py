"""Layouts: permutations and their inverses, who holds which token, and lengths that do not divide."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_core.errors import ShapeError, UnsupportedError
from lwm_core.layout import LAYOUTS, SequenceLayout

layouts = st.builds(SequenceLayout, st.sampled_from(LAYOUTS), st.integers(1, 9))
cases = layouts.flatmap(lambda layout: st.tuples(st.just(layout), st.integers(1, 7).map(lambda n: n * layout.multiple)))


@given(cases)
def test_the_inverse_undoes_the_permutation(case: tuple[SequenceLayout, int]) -> None:
    layout, size = case
    natural = np.random.default_rng(0).permutation(size)
    permuted = natural[layout.permutation(size)]
    assert np.array_equal(permuted[layout.inverse(size)], natural)
    assert layout.permutation(size).dtype == layout.inverse(size).dtype == np.int32


@given(cases)
def test_ranks_hold_every_token_once(case: tuple[SequenceLayout, int]) -> None:
    layout, size = case
    held = [layout.rank_indices(size, rank) for rank in range(layout.world)]
    assert {len(indices) for indices in held} == {size // layout.world}
    assert sorted(np.concatenate(held).tolist()) == list(range(size))
    assert np.array_equal(np.concatenate(held), layout.permutation(size))


@given(cases)
def test_runs_are_the_ranks_indices(case: tuple[SequenceLayout, int]) -> None:
    layout, size = case
    for rank, runs in enumerate(layout.runs(size)):
        indices = np.concatenate([np.arange(size)[run] for run in runs])
        assert np.array_equal(indices, layout.rank_indices(size, rank))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("contiguous", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("zigzag", [[0, 1, 6, 7], [2, 3, 4, 5]]),
        ("striped", [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ],
)
def test_eight_tokens_on_two_ranks(kind: str, expected: list[list[int]]) -> None:
    layout = SequenceLayout(kind, 2)  # type: ignore[arg-type]
    assert [layout.rank_indices(8, rank).tolist() for rank in range(2)] == expected


@given(st.integers(2, 8), st.integers(1, 6))
def test_zigzag_evens_out_causal_work(world: int, n: int) -> None:
    """Each rank's sum over its tokens of the number of keys they see is the same."""
    layout = SequenceLayout("zigzag", world)
    size = n * layout.multiple
    work = {int((layout.rank_indices(size, rank) + 1).sum()) for rank in range(world)}
    assert len(work) == 1


@given(layouts, st.integers(-3, 100))
def test_a_length_is_refused_unless_it_divides(layout: SequenceLayout, size: int) -> None:
    chunks = layout.world * (2 if layout.kind == "zigzag" and layout.world > 1 else 1)
    if size > 0 and size % chunks == 0:
        layout.check(size)
        return
    for ask in (layout.check, layout.permutation, layout.inverse, layout.runs):
        with pytest.raises(ShapeError, match=f"length {size} is not a multiple of {chunks}") as caught:
            ask(size)
    suggested = int(str(caught.value).rpartition("use ")[2])
    layout.check(suggested)


def test_wrong_layouts_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="'spiral' is unknown"):
        SequenceLayout("spiral")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="world is 0"):
        SequenceLayout("zigzag", 0)
    for rank in (-1, 2):
        with pytest.raises(ShapeError, match=f"rank {rank}"):
            SequenceLayout("striped", 2).rank_indices(8, rank)
