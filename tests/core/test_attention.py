"""Masks as intervals, against pairs judged one at a time; and the blocks a rank executes, against counting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lwm_core.attention import AttentionMask, document_bounds, executed_blocks, mask_bounds, needed_hops
from lwm_core.errors import ShapeError, UnsupportedError
from lwm_core.layout import LAYOUTS, SequenceLayout
from lwm_core.reference import visible
from lwm_core.testing.attention_cases import sees


@st.composite
def masks(draw: st.DrawFn) -> AttentionMask:
    kind = draw(st.sampled_from(["causal", "full", "block_causal"]))
    block = draw(st.integers(1, 9)) if kind == "block_causal" else None
    window = draw(st.none() | st.integers(block or 1, 20)) if kind != "full" else None
    return AttentionMask(kind, window, block)


@st.composite
def packed_rows(draw: st.DrawFn, most: int = 20) -> list[int]:
    """Documents numbered from 1, padding (0) at the end."""
    lengths = draw(st.lists(st.integers(1, 6), max_size=5))
    row = [number for number, n in enumerate(lengths, start=1) for _ in range(n)]
    return (row + [0] * draw(st.integers(0, 4)) or [1])[:most]


def may_see(mask: AttentionMask, ids: list[int], q: int, k: int) -> bool:
    """The definition in words, for one pair: itself and what came before; its block whole; the newest w of those."""

    def allowed(key: int) -> bool:
        if ids[q] == 0 or ids[key] != ids[q]:
            return False
        if mask.kind == "full":
            return True
        if mask.kind == "causal":
            return key <= q
        start = ids.index(ids[q])
        return (key - start) // mask.block <= (q - start) // mask.block  # type: ignore[operator]

    keys = [key for key in range(len(ids)) if allowed(key)]
    return k in (keys if mask.window is None else keys[-mask.window :])


@given(masks(), packed_rows())
def test_intervals_with_documents(mask: AttentionMask, ids: list[int]) -> None:
    expected = [[may_see(mask, ids, q, k) for k in range(len(ids))] for q in range(len(ids))]
    assert visible(mask, len(ids), np.array([ids]))[0].tolist() == expected
    assert sees(mask, np.array([ids]))[0].tolist() == expected, "the kit's own judge"


@given(masks(), st.integers(1, 25))
def test_intervals_without_documents(mask: AttentionMask, n: int) -> None:
    expected = [[may_see(mask, [1] * n, q, k) for k in range(n)] for q in range(n)]
    assert visible(mask, n)[0].tolist() == expected


@given(masks(), packed_rows())
def test_a_query_of_a_document_sees_itself(mask: AttentionMask, ids: list[int]) -> None:
    seen = visible(mask, len(ids), np.array([ids]))[0]
    assert np.diagonal(seen).tolist() == [number > 0 for number in ids]


def test_rows_of_a_batch_count_blocks_from_their_own_documents() -> None:
    ids = np.array([[1, 1, 1, 2, 2, 2], [1, 2, 2, 2, 2, 0]])
    low, high = mask_bounds(AttentionMask("block_causal", block=2), 6, ids)
    assert low.dtype == high.dtype == np.int32
    assert high.tolist() == [[1, 1, 2, 4, 4, 5], [0, 2, 2, 4, 4, 5]]


@given(packed_rows())
def test_document_bounds_by_a_walk(ids: list[int]) -> None:
    first, last = document_bounds(np.array([ids]))
    for i, number in enumerate(ids):
        a = b = i
        while a > 0 and ids[a - 1] == number:
            a -= 1
        while b + 1 < len(ids) and ids[b + 1] == number:
            b += 1
        assert (first[0, i], last[0, i]) == (a, b)


@settings(max_examples=150)
@given(st.data(), masks(), st.sampled_from(LAYOUTS), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_executed_blocks_by_counting(
    data: st.DataObject, mask: AttentionMask, kind: str, world: int, size: int, n: int
) -> None:
    """No block with a visible pair is left out, and a block that is counted may hold one by bounds and ids."""
    layout = SequenceLayout(kind, world)  # type: ignore[arg-type]
    seq_len = layout.multiple * size * n
    lengths = data.draw(st.lists(st.integers(1, seq_len), max_size=4))
    flat = [number for number, length in enumerate(lengths, start=1) for _ in range(length)]
    ids = (flat + [0] * seq_len)[:seq_len] if flat else [1] * seq_len
    counted = executed_blocks(mask, layout, seq_len, size, np.array(ids) if flat else None)
    low, high = (np.broadcast_to(b, (1, seq_len))[0] for b in mask_bounds(mask, seq_len, np.array([ids])))
    for rank in range(world):
        queries = [layout.rank_indices(seq_len, rank)[i : i + size] for i in range(0, seq_len // world, size)]
        keys = [
            layout.rank_indices(seq_len, other)[i : i + size]
            for other in range(world)
            for i in range(0, seq_len // world, size)
        ]
        needed = executed = 0
        for a in queries:
            for b in keys:
                needed += any(may_see(mask, ids, int(q), int(k)) for q in a for k in b)
                spans = min(b) <= max(high[a]) and max(b) >= min(low[a])
                ids_a, ids_b = [ids[i] for i in a], [ids[i] for i in b]
                meet = min(ids_b) <= max(ids_a) and max(ids_b) >= min(ids_a) and max(ids_a) > 0 and max(ids_b) > 0
                executed += spans and meet
        assert counted[rank] == executed
        assert counted[rank] >= needed
        if size == 1 and kind != "striped":
            assert counted[rank] == needed, "blocks of one token are judged exactly"


def test_causal_zigzag_halves_the_work_evenly() -> None:
    """Four ranks, two blocks each of eight: 36 of 64 block pairs, nine a rank; contiguous gives the last rank 15."""
    causal = AttentionMask()
    assert executed_blocks(causal, SequenceLayout("zigzag", 4), 64, 8).tolist() == [9, 9, 9, 9]
    assert executed_blocks(causal, SequenceLayout("contiguous", 4), 64, 8).tolist() == [3, 7, 11, 15]


def test_a_block_must_divide_a_run() -> None:
    with pytest.raises(ShapeError, match="does not divide a run of 8"):
        executed_blocks(AttentionMask(), SequenceLayout("zigzag", 4), 64, 16)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"kind": "diagonal"}, UnsupportedError),
        ({"kind": "full", "window": 4}, UnsupportedError),
        ({"kind": "block_causal"}, ShapeError),
        ({"kind": "causal", "block": 4}, ShapeError),
        ({"kind": "block_causal", "block": 0}, ShapeError),
        ({"kind": "causal", "window": 0}, ShapeError),
        ({"kind": "block_causal", "block": 8, "window": 7}, UnsupportedError),
    ],
)
def test_masks_without_meaning_are_refused(arguments: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        AttentionMask(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(
    "mask",
    [
        AttentionMask("causal"), AttentionMask("full"), AttentionMask("causal", window=1),
        AttentionMask("causal", window=9), AttentionMask("causal", window=30), AttentionMask("block_causal", block=5),
        AttentionMask("block_causal", block=5, window=7),
    ],
)  # fmt: skip
def test_no_needed_hop_is_left_out(kind: str, world: int, mask: AttentionMask) -> None:
    """Whatever some rank sees of another, documents or not, is in the hops; without documents nothing else is."""
    layout = SequenceLayout(kind, world)  # type: ignore[arg-type]
    hops = needed_hops(mask, layout, 48)
    assert hops[0] == 0 and list(hops) == sorted(set(hops))
    documents = np.repeat([1, 2, 3, 4], [7, 13, 25, 3])[None]
    found = []
    for ids in (None, documents):
        seen = visible(mask, 48, ids)[0]
        ranks = [layout.rank_indices(48, rank) for rank in range(world)]
        pairs = [(q, k) for q in range(world) for k in range(world) if seen[np.ix_(ranks[q], ranks[k])].any()]
        found.append({(q - k) % world for q, k in pairs})
    assert found[0] | found[1] <= set(hops)
    if kind != "striped" and mask.block is None:
        assert found[0] == set(hops)
