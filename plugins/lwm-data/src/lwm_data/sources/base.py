"""What a source gives: a plan of a window's rows, and the example behind each item of the plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lwm_core.batch import TokenSequence
from lwm_data.packing import best_fit, pack_whole

Key = tuple[int, ...]
"""Seed, stage, window and source: what a window's random numbers come from."""

Item = tuple[float, ...]
"""What a source needs, beside the key, to build one example; its meaning is the source's own."""


class Source(Protocol):
    """A source bound to a stage's row length. ``plan`` and ``build`` are pure functions of their arguments."""

    def plan(self, rows: int, key: Key) -> list[list[Item]]:
        """The items of each of ``rows`` rows; together they are no longer than a row."""
        ...

    def build(self, item: Item, key: Key) -> TokenSequence:
        """The example of an item of the plan of ``key``."""
        ...


def generator(key: Key, number: int = 0) -> np.random.Generator:
    """Random numbers of a window's plan (0) or of its example ``number`` (from 1)."""
    return np.random.default_rng((*key, number))


def plan_lengths(
    rows: int, seq_len: int, lengths: tuple[int, int], key: Key, need: Callable[[int], int] = lambda number: 0
) -> list[list[Item]]:
    """Items (number from 1, length) of examples that are made to measure: full rows, or packed shorter ones.

    Args:
        lengths: tokens of the shortest and of the longest; they are uniform.
        need: tokens that example ``number`` cannot do without; a length drawn below is raised to it.
    """
    shortest, longest = lengths
    if shortest == seq_len:
        return [[(number, seq_len)] for number in range(1, rows + 1)]
    random = generator(key)
    drawn: list[Item] = []

    def draw() -> Iterator[int]:
        while True:
            number = len(drawn) + 1
            length = max(int(random.integers(shortest, longest + 1)), need(number))
            drawn.append((number, length))
            yield length

    return [[drawn[i] for i in row] for row in best_fit(draw(), rows, seq_len)]


def plan_whole(
    rows: int, seq_len: int, count: int, key: Key, draw: Callable[[np.random.Generator, int], tuple[Item, int]]
) -> list[list[Item]]:
    """Items of examples that are packed whole: all ``count`` of them in random order, again where they are too few.

    Args:
        draw: the item of an example by its number from 0, and its length.
    """
    random = generator(key)
    drawn: list[tuple[Item, int]] = []
    left = rows * seq_len
    while left >= 0:
        for number in random.permutation(count):
            drawn.append(draw(random, int(number)))
            left -= drawn[-1][1]
            if left < 0:
                break
    packed = pack_whole([length for _, length in drawn], rows, seq_len)
    # Rows that were filled first have the longest examples; in random order no step has more of them than another.
    return [[drawn[i][0] for i in packed[row]] for row in random.permutation(rows)]


def example(ids: Sequence[int] | NDArray[np.int32], learnt: NDArray[np.bool_], share: float) -> TokenSequence:
    """An example whose ``share`` is spread evenly over its learnt tokens ``[N]``; its first token is never one."""
    learnt = learnt.copy()
    learnt[0] = False
    weights = learnt * (share / max(1, int(learnt.sum())))
    return TokenSequence(np.asarray(ids, np.int32), weights.astype(np.float32))
