"""Pure functions over lengths: long documents are cut into rows, short ones are packed, rows are shared out.

Shapes: S tokens of a row, n pieces.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

PATIENCE = 32
"""Pieces in a row that may fit nowhere before packing ends."""


def cut(offsets: NDArray[np.int64], seq_len: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Pieces ``[n, 2]`` (start, end) of the documents at ``offsets``, each at most ``seq_len`` long.

    A document that fits is one piece. A longer one is cut every ``seq_len`` tokens from a random first cut on, so
    that it gives full rows and two remainders, one at either end. Every token is in exactly one piece; pieces stand in
    the documents' order.
    """
    starts, lengths = offsets[:-1], np.diff(offsets)
    first = np.where(lengths > seq_len, random.integers(1, seq_len + 1, size=len(lengths)), lengths)
    counts = 1 + -(-(lengths - first) // seq_len)
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = starts[document] + np.where(number == 0, 0, first[document] + (number - 1) * seq_len)
    end = np.minimum(starts[document] + first[document] + number * seq_len, offsets[document + 1])
    return np.stack([begin, end], axis=1)


def best_fit(lengths: Iterable[int], rows: int, seq_len: int, patience: int = PATIENCE) -> list[list[int]]:
    """Numbers of the pieces in each of ``rows`` rows: a piece goes where it leaves the least room, else to a new row.

    Pieces are taken in order until ``patience`` of them in a row fit nowhere, or there are none left. No row exceeds
    ``seq_len``; within a row pieces keep their order. A piece that fits nowhere is left whole for another window.
    """
    packed: list[list[int]] = [[] for _ in range(rows)]
    room: list[tuple[int, int]] = []
    opened = missed = 0
    for number, length in enumerate(lengths):
        at = bisect.bisect_left(room, (length, -1))
        if at < len(room):
            left, row = room.pop(at)
        elif opened < rows:
            left, row, opened = seq_len, opened, opened + 1
        else:
            missed += 1
            if missed >= patience:
                break
            continue
        missed = 0
        packed[row].append(number)
        if left > length:
            bisect.insort(room, (left - length, row))
        elif opened == rows and not room:
            break
    return packed


def pack_whole(lengths: Sequence[int], rows: int, seq_len: int) -> list[list[int]]:
    """Numbers of the pieces in each of ``rows`` rows: the first so many pieces that go in, and none of the others.

    Best fit decreasing of a beginning of ``lengths``, the longest to within a 512th. What :func:`best_fit` leaves out
    is what is long, which changes the mix of long and short pieces; a beginning of random pieces keeps it. Within a row
    pieces keep their order.
    """

    def packed(count: int) -> list[list[int]] | None:
        order = sorted(range(count), key=lambda number: -lengths[number])
        found = best_fit((lengths[number] for number in order), rows, seq_len, patience=1)
        if sum(map(len, found)) < count:
            return None
        return [sorted(order[place] for place in row) for row in found]

    total = np.cumsum(lengths)
    high = int(np.searchsorted(total, rows * seq_len, side="right")) + 1  # so many do not go in, or there are not
    low, best = 0, [[] for _ in range(rows)]  # type: ignore[var-annotated]
    count = high - 1
    while high - low > max(1, high >> 9):
        found = packed(count)
        if found is None:
            high = count
        else:
            low, best = count, found
        count = (low + high) // 2
    return best


def share_out(weights: Mapping[str, float], rows: int, random: np.random.Generator) -> list[str]:
    """The source of each of ``rows`` rows, in random order: systematic sampling.

    Every source gets its share rounded down or up, and its exact share in the mean over many windows.
    """
    names = sorted(name for name, weight in weights.items() if weight > 0)
    bounds = np.cumsum([weights[name] for name in names])
    points = (np.arange(rows) + random.random()) / rows * bounds[-1]
    picks = np.minimum(np.searchsorted(bounds, points, side="right"), len(names) - 1)
    return [names[int(i)] for i in random.permutation(picks)]
