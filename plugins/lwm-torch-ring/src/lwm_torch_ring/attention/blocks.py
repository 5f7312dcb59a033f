"""Which parts of two ranks' tokens are computed, and how: tiles that need no mask, and few others.

The mask is an interval (see ``lwm_core.attention``): a query sees the keys from ``low`` to ``high`` of its document. In
a rank's slots that is an interval again. Queries whose intervals end at the same key make a *whole* tile, queries whose
intervals end one key further each make a whole tile and a *diagonal* one, which is square, and what is left is cut into
*ragged* tiles of at most chunk × chunk, the only ones that need a mask. No array here is longer than the sequence.

All of it is NumPy on the host, worked out once for a mask, or once for a batch where there are documents.

Shapes: B batch, S sequence, C tokens of a rank, R is B where documents make rows differ, else 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lwm_core.attention import AttentionMask, document_bounds, mask_bounds
from lwm_core.errors import UnsupportedError
from lwm_core.layout import SequenceLayout
from lwm_torch_ring.attention.tiles import Ints, Kind, Pack, Tile, packs

EXACT_SHARE = 4
"""A document or block of at least chunk / 4 queries gets tiles of its own; shorter ones share ragged tiles, where the
kernel does not take many tiles at once."""


class Plan:
    """The tiles of one rank's queries over every other rank's keys.

    Args:
        mask: which keys a query may see.
        layout, seq_len, rank: whose queries.
        chunk: longest side of a ragged tile.
        limit: longest side of any tile, for kernels that make a tile's scores as a whole; none: as long as they come.
        segment_ids: ``[B, S]`` in natural order, or none.
        packed: whether the kernel takes many tiles at once: then documents of any length get tiles of their own, which
            are given out in packs.

    Raises:
        UnsupportedError: tokens of one document do not stand together.
    """

    def __init__(
        self,
        mask: AttentionMask,
        layout: SequenceLayout,
        seq_len: int,
        rank: int,
        chunk: int,
        limit: int | None = None,
        segment_ids: NDArray[Any] | None = None,
        packed: bool = False,
    ) -> None:
        self._runs, self._chunk, self._limit = layout.runs(seq_len), chunk, limit
        self._packed = packed and segment_ids is not None
        self._least = 1 if self._packed else max(1, chunk // EXACT_SHARE)
        self._singles = self._packed and mask.window is None  # in a window's band every query is one of its own
        self._rows = 1 if segment_ids is None else len(segment_ids)
        low, high = mask_bounds(mask, seq_len, segment_ids)
        if segment_ids is not None:
            _check_documents(segment_ids)
            first, last = document_bounds(segment_ids)
            low, high = np.maximum(low, first), np.where(segment_ids == 0, -1, np.minimum(high, last))
        mine = layout.rank_indices(seq_len, rank)
        self._low, self._high = (np.atleast_2d(bound)[:, mine].astype(np.int64) for bound in (low, high))
        if (self._low == self._low[:1]).all() and (self._high == self._high[:1]).all():
            self._low, self._high = self._low[:1], self._high[:1]
        self._tiles: dict[int, tuple[Tile | Pack, ...]] = {}

    def tiles(self, source: int) -> tuple[Tile | Pack, ...]:
        """The tiles over the keys of rank ``source``; packs of them for a kernel that takes these."""
        if source not in self._tiles:
            found: Iterable[Tile | Pack] = self._over(self._runs[source])
            if self._packed:
                found = packs(self._over(self._runs[source]), self._rows, self._low.shape[1])
            self._tiles[source] = tuple(found)
        return self._tiles[source]

    def _over(self, runs: list[slice]) -> Iterator[Tile]:
        for row, (low, high) in enumerate(zip(self._low, self._high, strict=True)):
            rows = slice(None) if len(self._low) == 1 else slice(row, row + 1)
            found: list[Tile] = []
            slot = 0
            for run in runs:
                count = len(range(run.start, run.stop, run.step or 1))
                first, last = _in_slots(low, high, run, count)
                exact = list(_exact(first, last, self._least, self._singles))
                found += _decomposed(first, last, rows, slot, self._chunk, exact)
                slot += count
            found = _joined(_joined(found, "k", "q"), "q", "k")
            yield from found if self._limit is None else (part for tile in found for part in _cut(tile, self._limit))


def _check_documents(segment_ids: NDArray[Any]) -> None:
    first, _ = document_bounds(segment_ids)
    for row, (ids, starts) in enumerate(zip(segment_ids, first, strict=True)):
        begun = ids[np.unique(starts)]
        begun = begun[begun != 0]
        numbers, counts = np.unique(begun, return_counts=True)
        if (counts > 1).any():
            raise UnsupportedError(
                f"torch-ring: segment id {numbers[counts > 1][0]} stands in two places of row {row}; the tokens of a "
                "document must stand together"
            )


def _in_slots(low: Ints, high: Ints, run: slice, count: int) -> tuple[Ints, Ints]:
    """Natural bounds ``low..high`` → half-open slots of a run of keys; 0, 0 where nothing is seen."""
    step = run.step or 1
    first = np.clip(-((run.start - low) // step), 0, count)
    last = np.clip((high - run.start) // step + 1, 0, count)
    nothing = last <= first
    return np.where(nothing, 0, first), np.where(nothing, 0, last)


def _decomposed(
    low: Ints, high: Ints, rows: slice, slot: int, chunk: int, exact: Iterable[tuple[int, int, int]]
) -> Iterator[Tile]:
    """The tiles of all queries over one run of keys, which begins at ``slot``; ``exact`` queries get their own."""
    if not high.any():
        return

    def tile(q: slice, first: int, last: int, kind: Kind) -> Iterator[Tile]:
        if last > first and q.stop > q.start:
            yield Tile(rows, q, slice(slot + first, slot + last), kind)

    done = 0
    for start, stop, slope in exact:
        yield from _ragged(low, high, done, start, rows, slot, chunk)
        done = stop
        if slope == 0:
            yield from tile(slice(start, stop), int(low[start]), int(high[start]), "whole")
            continue
        begin = start + max(0, int(low[start] - high[start]) + 1)  # the first that sees something
        if begin < stop:
            square = int(high[begin]) - 1
            yield from tile(slice(begin, stop), int(low[start]), square, "whole")
            yield from tile(slice(begin, stop), square, square + stop - begin, "diagonal")
    yield from _ragged(low, high, done, len(low), rows, slot, chunk)


def _exact(low: Ints, high: Ints, least: int, singles: bool) -> Iterator[tuple[int, int, int]]:
    """As :func:`_regular`, and with ``singles`` every other query by itself."""
    done = 0
    for start, stop, slope in _regular(low, high, least):
        if singles:
            yield from ((at, at + 1, 0) for at in range(done, start))
        yield start, stop, slope
        done = stop
    if singles:
        yield from ((at, at + 1, 0) for at in range(done, len(low)))


def _regular(low: Ints, high: Ints, least: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, slope) of queries whose ``low`` stays and whose ``high`` grows by slope 0 or 1, in order."""
    steps = np.where(np.diff(low) != 0, 2, np.diff(high))
    steps = np.where((steps == 0) | (steps == 1), steps, 2)
    edges = np.concatenate([[0], np.flatnonzero(np.diff(steps)) + 1, [len(steps)]]) if len(steps) else np.array([0, 0])
    done = 0
    if len(low) == 1:
        yield 0, 1, 0
    for begin, end in pairwise(edges.tolist()):
        if begin == end or steps[begin] == 2:
            continue
        start, stop = max(done, begin), end + 1
        if stop - start >= least or (high[start:stop] == 0).all():
            yield start, stop, int(steps[begin])
            done = stop


def _ragged(low: Ints, high: Ints, start: int, stop: int, rows: slice, slot: int, chunk: int) -> Iterator[Tile]:
    """The tiles of queries ``start..stop``, which have no simple shape."""
    for begin in range(start, stop, chunk):
        end = min(begin + chunk, stop)
        seeing = high[begin:end] > low[begin:end]
        if not seeing.any():
            continue
        first, last = int(low[begin:end][seeing].min()), int(high[begin:end].max())
        common, until = (int(low[begin:end].max()), int(high[begin:end].min())) if seeing.all() else (0, 0)
        parts = [(first, last)]
        if until - common >= chunk // 2 and until > common:
            yield Tile(rows, slice(begin, end), slice(slot + common, slot + until), "whole")
            parts = [(first, common), (until, last)]
        for left, right in parts:
            for at in range(left, right, chunk):
                yield from _masked(low, high, begin, end, at, min(at + chunk, right), rows, slot)


def _masked(low: Ints, high: Ints, begin: int, end: int, at: int, to: int, rows: slice, slot: int) -> Iterator[Tile]:
    """One ragged tile without the queries at its ends that see nothing; a diagonal one where it is one after all."""
    low, high = (np.clip(bound[begin:end] - at, 0, to - at) for bound in (low, high))
    seeing = np.flatnonzero(high > low)
    if not len(seeing):
        return
    first, last = int(seeing[0]), int(seeing[-1]) + 1
    low, high, keys = low[first:last], high[first:last], to - at
    q, k = slice(begin + first, begin + last), slice(slot + at, slot + to)
    if (low == 0).all() and (high == keys).all():
        yield Tile(rows, q, k, "whole")
    elif (low == 0).all() and len(high) == keys and (high == np.arange(1, keys + 1)).all():
        yield Tile(rows, q, k, "diagonal")
    else:
        yield Tile(rows, q, k, "ragged", low, high)


def _joined(tiles: list[Tile], along: str, same: str) -> list[Tile]:
    """Whole tiles that are alike in ``same`` and touch in ``along``, as one; the others as they are."""

    def place(tile: Tile) -> tuple[int, int, int]:
        here = getattr(tile, same)
        return here.start, here.stop, getattr(tile, along).start

    whole = sorted((tile for tile in tiles if tile.kind == "whole"), key=place)
    found: list[Tile] = []
    for tile in whole:
        here, last = getattr(tile, along), getattr(found[-1], along) if found else None
        if last is not None and getattr(found[-1], same) == getattr(tile, same) and last.stop == here.start:
            found[-1] = replace(found[-1], **{along: slice(last.start, here.stop)})
        else:
            found.append(tile)
    return found + [tile for tile in tiles if tile.kind != "whole"]


def _pieces(part: slice, limit: int) -> list[slice]:
    return [slice(at, min(at + limit, part.stop)) for at in range(part.start, part.stop, limit)]


def _cut(tile: Tile, limit: int) -> Iterable[Tile]:
    """The same tile in tiles of at most ``limit`` queries and keys."""
    if tile.kind == "ragged" or max(tile.q.stop - tile.q.start, tile.k.stop - tile.k.start) <= limit:
        return [tile]
    queries, keys = _pieces(tile.q, limit), _pieces(tile.k, limit)
    if tile.kind == "whole":
        return [replace(tile, q=q, k=k) for q in queries for k in keys]
    return [
        replace(tile, q=q, k=k, kind="diagonal" if i == j else "whole")
        for i, q in enumerate(queries)
        for j, k in enumerate(keys[: i + 1])
    ]
