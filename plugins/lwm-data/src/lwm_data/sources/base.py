"""What a source gives: a plan of a window's rows, and the example behind each item of the plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lwm_core.batch import TokenSequence
from lwm_data.packing import best_fit

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
    rows: int, seq_len: int, min_tokens: int | None, key: Key, need: Callable[[int], int] = lambda number: 0
) -> list[list[Item]]:
    """Items (number from 1, length) of examples that are made to measure: full rows, or packed random lengths.

    Args:
        need: tokens that example ``number`` cannot do without; a length drawn below is raised to it.
    """
    if min_tokens is None:
        return [[(number, seq_len)] for number in range(1, rows + 1)]
    random = generator(key)
    drawn: list[Item] = []

    def lengths() -> Iterator[int]:
        while True:
            number = len(drawn) + 1
            length = max(int(random.integers(min_tokens, seq_len + 1)), need(number))
            drawn.append((number, length))
            yield length

    return [[drawn[i] for i in row] for row in best_fit(lengths(), rows, seq_len)]


def example(ids: Sequence[int] | NDArray[np.int32], learnt: NDArray[np.bool_], share: float) -> TokenSequence:
    """An example whose ``share`` is spread evenly over its learnt tokens ``[N]``; its first token is never one."""
    learnt = learnt.copy()
    learnt[0] = False
    weights = learnt * (share / max(1, int(learnt.sum())))
    return TokenSequence(np.asarray(ids, np.int32), weights.astype(np.float32))
