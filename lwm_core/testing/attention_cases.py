"""The standard cases of the attention kit: worlds, layouts, masks, and the arrays that the tests share.

Every test uses one shape and one dtype wherever it can: for a compiling backend the compilations are the cost.

Shapes: B batch, S sequence, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lwm_core.attention import AttentionMask
from lwm_core.layout import LAYOUTS, SequenceLayout

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

WORLDS = (1, 2, 3, 4, 8)

#: Tokens a row: every world deals it evenly in every layout, and in more than one kernel block a rank.
SEQ_LEN = 96
ROWS, HEADS, KV_HEADS, HEAD_DIM = 2, 8, 2, 16

MASKS: dict[str, AttentionMask] = {
    "causal": AttentionMask("causal"),
    "full": AttentionMask("full"),
    "block-causal": AttentionMask("block_causal", block=5),
    "window": AttentionMask("causal", window=19),
    "block-causal-window": AttentionMask("block_causal", window=23, block=7),
}
"""Blocks and windows that divide neither a shard nor a document."""


def exhaustive() -> bool:
    """Whether ``LWM_TESTING_EXHAUSTIVE=1`` asks for the whole cross product instead of the covering part of it."""
    return os.environ.get("LWM_TESTING_EXHAUSTIVE") == "1"


def by_world() -> list[tuple[int, str]]:
    """(world, layout): all of them; one layout at world 1, where layouts are alike."""
    return [(world, layout) for world in WORLDS for layout in LAYOUTS if world > 1 or layout == LAYOUTS[0]]


def matrix(thorough: bool = True) -> list[tuple[int, str, str]]:
    """(world, layout, mask): the full product for 2, 4 and 8; one layout at world 1, where layouts are alike; at 3
    one mask a layout, since that world differs from 2 and 4 in divisibility alone, and at 2, 4 and 8 too if not
    ``thorough``."""
    names = list(MASKS)
    cases = []
    for world in WORLDS:
        for place, layout in enumerate(LAYOUTS):
            for mask in names:
                rare = place != 0 if world == 1 else (world == 3 or not thorough) and names.index(mask) != 2 * place
                if exhaustive() or not rare:
                    cases.append((world, layout, mask))
    return cases


def pairwise(thorough: bool = True) -> list[tuple[int, str, str, int]]:
    """(world, layout, mask, K) without segment ids: every pair of values occurs, K is H (MHA) or 1 (MQA); one case a
    world if not ``thorough``."""
    names = list(MASKS)
    cases = []
    for i, world in enumerate(WORLDS):
        for j, layout in enumerate(LAYOUTS):
            for m, mask in enumerate(names):
                for kv_heads in (HEADS, 1):
                    kept = m == (i + 2 * j) % len(names) and kv_heads == (HEADS if (i + j) % 2 else 1)
                    rare = j != 0 if world == 1 else not thorough and j != i % len(LAYOUTS)
                    if exhaustive() or (kept and not rare):
                        cases.append((world, layout, mask, kv_heads))
    return cases


def large(thorough: bool = True) -> list[tuple[int, str, str, str]]:
    """(world, layout, mask, dtype) of the largest logits: all layouts with a causal and a full mask in float32, one in
    bfloat16; one layout and mask if not ``thorough``."""
    wide = [(world, layout, mask, "float32") for world, layout in by_world() for mask in ("causal", "full")]
    few = [(world, LAYOUTS[0], "causal", dtype) for world in WORLDS for dtype in ("float32", "bfloat16")]
    return few if not thorough else wide + few[1::2]


def narrow(thorough: bool = True) -> list[tuple[int, str]]:
    """(world, layout) in bfloat16: at 8 all layouts, elsewhere one; one everywhere if not ``thorough``."""
    rare = [(8, "zigzag"), (8, "striped")] if thorough else []
    return [(2, "contiguous"), (3, "zigzag"), (4, "striped"), (8, "contiguous"), *rare]


def _normal(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@dataclass
class Arrays:
    """The inputs of one call, natural order."""

    q: NDArray[np.float32]
    k: NDArray[np.float32]
    v: NDArray[np.float32]
    dout: NDArray[np.float32]
    segment_ids: NDArray[np.int32] | None

    def copy(self) -> Arrays:
        """A deep copy, to be changed."""
        ids = None if self.segment_ids is None else self.segment_ids.copy()
        return Arrays(self.q.copy(), self.k.copy(), self.v.copy(), self.dout.copy(), ids)

    def perturb(self, row: int, tokens: NDArray[np.integer] | int) -> Arrays:
        """A copy whose q, k and v differ in every element at ``tokens`` of ``row``."""
        changed = self.copy()
        for array in (changed.q, changed.k, changed.v):
            array[row, tokens] = -2.0 * array[row, tokens] + 0.5
        return changed


def inputs(segment_ids: NDArray[np.int32] | None, kv_heads: int = KV_HEADS, seq_len: int = SEQ_LEN) -> Arrays:
    """Standard-normal inputs; the same for the same arguments."""
    shape = (ROWS, seq_len)
    return Arrays(
        _normal(1, *shape, HEADS, HEAD_DIM),
        _normal(2, *shape, kv_heads, HEAD_DIM),
        _normal(3, *shape, kv_heads, HEAD_DIM),
        _normal(4, *shape, HEADS, HEAD_DIM),
        segment_ids,
    )


def single_document(seq_len: int = SEQ_LEN) -> NDArray[np.int32]:
    """Every row one document over all ranks."""
    return np.ones((ROWS, seq_len), np.int32)


def rows_of(*lengths: list[int], seq_len: int = SEQ_LEN) -> NDArray[np.int32]:
    """Segment ids of rows of documents with these lengths, padded with 0."""
    ids = np.zeros((len(lengths), seq_len), np.int32)
    for row, documents in zip(ids, lengths, strict=True):
        start = 0
        for number, length in enumerate(documents, start=1):
            row[start : start + length] = number
            start += length
    return ids


def packed() -> NDArray[np.int32]:
    """Row 0: one document over all ranks. Row 1: documents that cross every shard edge of every world, two of one
    token side by side, one that ends on an edge, and padding."""
    return rows_of([SEQ_LEN], [17, 1, 1, 29, 22, 2, 13])


def documents(segment_ids: NDArray[np.int32]) -> Iterator[tuple[int, slice]]:
    """(row, place) of every document."""
    for b, row in enumerate(segment_ids):
        for number in range(1, int(row.max()) + 1):
            places = np.flatnonzero(row == number)
            yield b, slice(int(places[0]), int(places[-1]) + 1)


def unseen(layout: SequenceLayout, pattern: str) -> NDArray[np.int32]:
    """Segment ids with rows that see nothing: tokens of ``pattern`` are 0, each run between them is a document.

    ``one-shard``: some tokens of rank 0; ``every-shard``: some of each; ``whole-rank``: all of the last rank's in row
    0 and all of rank 0's in row 1; ``whole-row``: all of row 1.
    """
    seen = np.ones((ROWS, SEQ_LEN), bool)
    shards = [layout.rank_indices(SEQ_LEN, rank) for rank in range(layout.world)]
    if pattern == "one-shard":
        seen[:, shards[0][1:4]] = False
    elif pattern == "every-shard":
        for shard in shards:
            seen[:, shard[2:5]] = False
    elif pattern == "whole-rank":
        seen[0, shards[-1]] = False
        seen[1, shards[0]] = False
    else:
        seen[1] = False
    starts = seen & ~np.pad(seen, ((0, 0), (1, 0)))[:, :-1]
    return np.where(seen, np.cumsum(starts, axis=1), 0).astype(np.int32)


UNSEEN = ("one-shard", "every-shard", "whole-rank", "whole-row")


def edges(layout: SequenceLayout, most: int = 10) -> list[int]:
    """Natural indices on both sides of where one rank's tokens end and another's begin, both ends of the row too."""
    owner = layout.inverse(SEQ_LEN) // (SEQ_LEN // layout.world)
    last = np.flatnonzero(np.diff(owner))
    found = sorted({0, SEQ_LEN - 1, *last.tolist(), *(last + 1).tolist()})
    if len(found) > most:  # striped: every token is an edge; take some of every rank
        found = [found[i] for i in np.linspace(0, len(found) - 1, most).round().astype(int)]
    return found


def sees(mask: AttentionMask, segment_ids: NDArray[np.int32]) -> NDArray[np.bool_]:
    """``[B, Sq, Sk]``: whether query q sees key k, from the masks' definition in words.

    Written apart from :func:`lwm_core.attention.mask_bounds` on purpose: the kit's two judges share no code.
    """
    index = np.arange(segment_ids.shape[1])
    q, k = index[:, None], index[None, :]
    result = np.zeros((*segment_ids.shape, segment_ids.shape[1]), bool)
    for b, ids in enumerate(segment_ids):
        same = (ids[:, None] == ids[None, :]) & (ids[:, None] != 0)
        if mask.kind == "full":
            result[b] = same
            continue
        start = np.array([int(np.argmax(ids == number)) for number in ids])
        block = (index - start) // (mask.block or 1)
        may = same & (block[None, :] <= block[:, None] if mask.kind == "block_causal" else k <= q)
        if mask.window is not None:
            newer = may[:, ::-1].cumsum(axis=1)[:, ::-1]  # how many it may see from this key on
            may &= newer <= mask.window
        result[b] = may
    return result


def as_dtype(a: Arrays, dtype: str) -> Arrays:
    """The arrays rounded to ``dtype``."""
    kind = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    return Arrays(a.q.astype(kind), a.k.astype(kind), a.v.astype(kind), a.dout.astype(kind), a.segment_ids)


def unpacked(a: Arrays, places: list[slice]) -> Arrays:
    """Row 1's documents at ``places``, each alone at the start of a row; values in the padding stay as they were."""
    alone = a.copy()
    ids = np.zeros((ROWS, SEQ_LEN), np.int32)
    for b, place in enumerate(places):
        size = place.stop - place.start
        ids[b, :size] = 1
        for name in ("q", "k", "v", "dout"):
            getattr(alone, name)[b, :size] = getattr(a, name)[1, place]
    alone.segment_ids = ids
    return alone


def dominated(a: Arrays, mask: AttentionMask) -> tuple[Arrays, NDArray[np.bool_]]:
    """Logits of +10240 at one key (row 0: the first, row 1: the middle one) and −10240 at all others, exactly.

    Every product is a sum of powers of two times 5, exact in bfloat16, and 1/√16 is exact: the backward pass then
    meets the forward's logits to the bit in any order of summation.

    Returns:
        the arrays, and ``[B, S]`` whether a query sees the dominant key.
    """
    large = a.copy()
    large.q[:], large.k[:] = 32.0, -80.0
    keys = (0, SEQ_LEN // 2)
    for row, key in enumerate(keys):
        large.k[row, key] = 80.0
    seen = sees(mask, single_document())
    return large, np.stack([seen[row, :, key] for row, key in enumerate(keys)])
