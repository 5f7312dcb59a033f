"""Tiles: together exactly what the mask shows, each once, and ragged only where they must be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lwm_core.attention import AttentionMask
from lwm_core.errors import UnsupportedError
from lwm_core.layout import LAYOUTS, SequenceLayout
from lwm_core.reference import visible
from lwm_torch_ring.attention.blocks import Plan, Tile

MASKS = st.one_of(
    st.just(AttentionMask("causal")),
    st.just(AttentionMask("full")),
    st.integers(1, 40).map(lambda window: AttentionMask("causal", window=window)),
    st.integers(1, 20).map(lambda block: AttentionMask("block_causal", block=block)),
    st.tuples(st.integers(1, 12), st.integers(0, 20)).map(
        lambda sizes: AttentionMask("block_causal", block=sizes[0], window=sum(sizes))
    ),
)


def painted(tile: Tile) -> NDArray[np.int64]:
    """``[q, k]``: 1 where the tile lets a query see a key."""
    queries, keys = tile.q.stop - tile.q.start, tile.k.stop - tile.k.start
    if tile.kind == "whole":
        return np.ones((queries, keys), int)
    if tile.kind == "diagonal":
        assert queries == keys
        return np.tri(queries, dtype=int)
    assert tile.low is not None and tile.high is not None
    key = np.arange(keys)
    return ((tile.low[:, None] <= key) & (key < tile.high[:, None])).astype(int)


def everything(layout: SequenceLayout, length: int, rows: int, plans: list[Plan]) -> NDArray[np.int64]:
    """``[B, Sq, Sk]`` in natural order: how often the tiles of all ranks compute a pair."""
    times = np.zeros((rows, length, length), int)
    for rank, plan in enumerate(plans):
        for source in range(layout.world):
            mine = np.zeros((rows, length // layout.world, length // layout.world), int)
            for tile in plan.tiles(source):
                mine[tile.rows, tile.q, tile.k] += painted(tile)
            queries, keys = (layout.rank_indices(length, r) for r in (rank, source))
            times[:, queries[:, None], keys] += mine
    return times


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(LAYOUTS),
    world=st.integers(1, 4),
    mask=MASKS,
    chunk=st.integers(1, 24),
    limited=st.booleans(),
    lengths=st.none() | st.lists(st.lists(st.integers(1, 30), max_size=6), min_size=1, max_size=3),
    parts=st.integers(1, 10),
)
def test_tiles_are_what_the_mask_shows(kind, world, mask, chunk, limited, lengths, parts):  # type: ignore[no-untyped-def]
    """For any mask, layout, documents with padding before and after, and any sizes of tiles."""
    layout, limit = SequenceLayout(kind, world), chunk if limited else None
    length = layout.multiple * parts
    ids = None
    if lengths is not None:
        ids = np.zeros((len(lengths), length), np.int32)
        for row, documents in zip(ids, lengths, strict=True):
            at = len(documents) % 3
            for number, size in enumerate(documents, start=1):
                row[at : at + size] = number
                at += size
    plans = [Plan(mask, layout, length, rank, chunk, limit, ids) for rank in range(world)]
    rows = 1 if ids is None else len(ids)
    np.testing.assert_array_equal(everything(layout, length, rows, plans), visible(mask, length, ids).astype(int))
    for tile in (tile for plan in plans for source in range(world) for tile in plan.tiles(source)):
        sides = tile.q.stop - tile.q.start, tile.k.stop - tile.k.start
        assert max(sides) <= (limit or length) and (tile.kind != "ragged" or max(sides) <= chunk)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_causal_sequence_needs_no_mask_and_few_tiles(kind: str, world: int) -> None:
    """At most one diagonal and one whole tile for each run of queries, however long the sequence is."""
    layout = SequenceLayout(kind, world)  # type: ignore[arg-type]
    for rank in range(world):
        plan = Plan(AttentionMask("causal"), layout, 1 << 14, rank, 512)
        for source in range(world):
            kinds = [tile.kind for tile in plan.tiles(source)]
            assert "ragged" not in kinds and len(kinds) <= 3, kinds


def test_documents_of_some_length_need_no_mask() -> None:
    """Each is a diagonal tile of its own; the short ones share ragged tiles."""
    lengths = [700, 130, 1000, 20, 20, 20, 158]
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)[None].astype(np.int32)
    plan = Plan(AttentionMask("causal"), SequenceLayout("contiguous"), ids.shape[1], 0, 512, None, ids)
    tiles = plan.tiles(0)
    assert sorted(t.q.stop - t.q.start for t in tiles if t.kind == "diagonal") == [130, 158, 700, 1000]
    assert [(t.q, t.k) for t in tiles if t.kind == "ragged"] == [(slice(1830, 1890), slice(1830, 1890))]


def test_a_window_is_a_band() -> None:
    """Work grows with the window, not with the length, and most of a wide one is whole."""
    length, window, chunk = 8192, 2048, 256
    plan = Plan(AttentionMask("causal", window=window), SequenceLayout("contiguous"), length, 0, chunk)
    area = {"whole": 0, "diagonal": 0, "ragged": 0}
    for tile in plan.tiles(0):
        area[tile.kind] += (tile.q.stop - tile.q.start) * (tile.k.stop - tile.k.start)
    assert sum(area.values()) < length * (window + 2 * chunk)
    assert area["ragged"] < 0.2 * area["whole"]


def test_a_document_in_two_places_is_refused() -> None:
    ids = np.array([[1, 1, 2, 1]], np.int32)
    with pytest.raises(UnsupportedError, match="segment id 1 stands in two places of row 0"):
        Plan(AttentionMask("causal"), SequenceLayout("contiguous"), 4, 0, 2, None, ids)
    Plan(AttentionMask("causal"), SequenceLayout("contiguous"), 4, 0, 2, None, np.array([[0, 1, 0, 2]], np.int32))
