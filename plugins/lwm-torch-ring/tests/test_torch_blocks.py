"""Tiles: together exactly what the mask shows, each once, and ragged only where they must be."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lwm_core.attention import AttentionMask
from lwm_core.errors import UnsupportedError
from lwm_core.layout import LAYOUTS, SequenceLayout
from lwm_core.reference import visible
from lwm_torch_ring.attention.blocks import Plan
from lwm_torch_ring.attention.tiles import Pack, Tile

CPU = torch.device("cpu")
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


def parts_of(pack: Pack, tokens: int) -> list[tuple[int, Tile]]:
    """(row, tile) of a pack's parts, with what a device is given checked against them."""
    q, k, spans = pack.on(CPU)
    placed = (x if isinstance(x, slice) else x.numpy() for x in (q, k))
    every = np.arange(max(part.stop for pair in pack.parts for part in pair))
    found = []
    for place, edges, longest, side in zip(placed, spans[:2], spans[2:], zip(*pack.parts, strict=True), strict=True):
        taken = every[place]
        assert len(np.unique(taken)) == len(taken), "a token is in a pack twice"
        bounds = edges.numpy()
        sequences = [taken[start:stop] for start, stop in pairwise(bounds)]
        assert bounds.dtype == np.int32 and bounds[0] == 0 and longest == max(map(len, sequences))
        found.append([(int(x[0] // tokens), slice(int(x[0] % tokens), int(x[-1] % tokens) + 1)) for x in sequences])
        assert all(np.array_equal(x, every[part]) for x, part in zip(sequences, side, strict=True))
    queries, keys = found
    assert [row for row, _ in queries] == [row for row, _ in keys]
    return [(row, Tile(slice(row, row + 1), q, k, pack.kind)) for (row, q), (_, k) in zip(queries, keys, strict=True)]


def everything(layout: SequenceLayout, length: int, rows: int, plans: list[Plan]) -> NDArray[np.int64]:
    """``[B, Sq, Sk]`` in natural order: how often the tiles of all ranks compute a pair."""
    times = np.zeros((rows, length, length), int)
    for rank, plan in enumerate(plans):
        for source in range(layout.world):
            mine = np.zeros((rows, length // layout.world, length // layout.world), int)
            for tile in plan.tiles(source):
                if isinstance(tile, Pack):
                    for row, part in parts_of(tile, length // layout.world):
                        mine[row, part.q, part.k] += painted(part)
                else:
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
    packed=st.booleans(),
)
def test_tiles_are_what_the_mask_shows(kind, world, mask, chunk, limited, lengths, parts, packed):  # type: ignore[no-untyped-def]
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
    plans = [Plan(mask, layout, length, rank, chunk, limit, ids, packed) for rank in range(world)]
    rows = 1 if ids is None else len(ids)
    np.testing.assert_array_equal(everything(layout, length, rows, plans), visible(mask, length, ids).astype(int))
    for tile in (tile for plan in plans for source in range(world) for tile in plan.tiles(source)):
        if isinstance(tile, Pack):
            continue
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


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("world", [1, 4])
def test_documents_are_packed_without_any_mask(kind: str, world: int) -> None:
    """However short and many they are: a few calls for each pair of ranks, and nothing ragged."""
    random = np.random.default_rng(0)
    lengths = random.integers(1, 300, 200)
    ids = np.repeat(np.arange(1, 201), lengths)[:16384]
    ids = np.stack([ids, ids[::-1].max() + 1 - ids[::-1]]).astype(np.int32)
    layout = SequenceLayout(kind, world)  # type: ignore[arg-type]
    for rank in range(world):
        plan = Plan(AttentionMask("causal"), layout, ids.shape[1], rank, 512, None, ids, True)
        for source in range(world):
            tiles = plan.tiles(source)
            assert len(tiles) <= 5 and all(tile.kind != "ragged" for tile in tiles), tiles
    plain = Plan(AttentionMask("causal"), layout, ids.shape[1], 0, 512, None, ids)
    assert len(plain.tiles(0)) > 20


def test_rows_that_are_alike_are_packed_together() -> None:
    ids = np.repeat(np.array([[1, 1, 1, 2, 2, 3]], np.int32), 3, 0)
    plan = Plan(AttentionMask("causal"), SequenceLayout("contiguous"), 6, 0, 4, None, ids, True)
    (pack,) = (tile for tile in plan.tiles(0) if tile.kind == "diagonal")
    assert isinstance(pack, Pack) and len(pack.parts) == 6
    whole = [tile for tile in plan.tiles(0) if tile.kind == "whole"]
    assert [(tile.rows, tile.q, tile.k) for tile in whole] == [(slice(None), slice(5, 6), slice(5, 6))]  # type: ignore[union-attr]


def test_a_single_document_stays_a_tile() -> None:
    """What is alone of its kind goes to the kernel for tiles, all rows at once where they are alike."""
    plan = Plan(AttentionMask("causal"), SequenceLayout("contiguous"), 64, 0, 4, None, np.ones((3, 64), np.int32), True)
    (tile,) = plan.tiles(0)
    assert isinstance(tile, Tile) and tile.kind == "diagonal" and tile.rows == slice(None)


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
