"""Source ``text``: real documents, every token learnt."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lwm_core.batch import TokenSequence
from lwm_data.corpus import Corpus
from lwm_data.options import TextOptions
from lwm_data.packing import best_fit, cut
from lwm_data.sources.base import Item, Key, generator

BLOCK = 4096
"""Pieces that are turned into Python numbers at a time."""


class TextSource:
    """Documents up to a row's length are packed whole; longer ones are cut into rows at random offsets.

    A window draws the pieces of the whole corpus in random order and without repetition, as many as its rows take, and
    starts over with new cuts where the corpus is smaller than the window. Windows are drawn independently.

    An item is (start, end, weight of a token).
    """

    def __init__(self, options: TextOptions, corpus: Corpus, seq_len: int) -> None:
        self._options, self._corpus, self._seq_len = options, corpus, seq_len

    def plan(self, rows: int, key: Key) -> list[list[Item]]:
        """See :class:`~lwm_data.sources.base.Source`."""
        drawn: list[Item] = []

        def lengths() -> Iterator[int]:
            for start, end in self._pieces(generator(key)):
                drawn.append((start, end, self._weight(start, end)))
                yield end - start

        return [[drawn[i] for i in row] for row in best_fit(lengths(), rows, self._seq_len)]

    def build(self, item: Item, key: Key) -> TokenSequence:
        """See :class:`~lwm_data.sources.base.Source`."""
        start, end, weight = int(item[0]), int(item[1]), item[2]
        weights = np.full(end - start, weight, np.float32)
        weights[0] = 0.0
        return TokenSequence(self._corpus.tokens[start:end], weights)

    def _pieces(self, random: np.random.Generator) -> Iterator[tuple[int, int]]:
        while True:
            pieces = cut(self._corpus.offsets, self._seq_len, random)
            order = random.permutation(len(pieces))
            for first in range(0, len(order), BLOCK):
                yield from pieces[order[first : first + BLOCK]].tolist()

    def _weight(self, start: int, end: int) -> float:
        """Weight of a token: a whole document's sum to the share; a part of one counts as part of a full row."""
        document = int(np.searchsorted(self._corpus.offsets, start, side="right"))
        whole = start == self._corpus.offsets[document - 1] and end == self._corpus.offsets[document]
        by_itself = whole and self._options.weigh == "example"
        return self._options.share / max(1, (end - start if by_itself else self._seq_len) - 1)
