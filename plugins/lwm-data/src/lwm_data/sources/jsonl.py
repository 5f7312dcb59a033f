"""Source ``jsonl``: whole lines in LWM's field language, packed."""

from __future__ import annotations

import numpy as np

from lwm_core.batch import TokenSequence
from lwm_core.errors import ShapeError
from lwm_data.lines import LineCorpus
from lwm_data.sources.base import Item, Key, plan_whole


class JsonlSource:
    """An item is (number of the line)."""

    def __init__(self, corpus: LineCorpus, seq_len: int) -> None:
        """Raises ShapeError where a line is longer than a row, unless such are left out."""
        self._corpus, self._seq_len = corpus, seq_len
        lengths = corpus.lengths
        self._numbers = np.flatnonzero(lengths <= seq_len)
        who = f"jsonl source {corpus.name!r}"
        if len(self._numbers) < len(lengths) and "too-long" not in corpus.options.leave_out:
            worst = int(np.argmax(lengths))
            raise ShapeError(
                f"{who}: {corpus.place(worst)} has {lengths[worst]} tokens, but the stage's rows have {seq_len}; use a "
                "longer seq_len, a lower max_frames, or set leave_out = ['too-long']"
            )
        if not len(self._numbers):
            raise ShapeError(f"{who}: none of its lines fits a row of {seq_len} tokens")

    def plan(self, rows: int, key: Key) -> list[list[Item]]:
        """See :class:`~lwm_data.sources.base.Source`."""

        def draw(random: np.random.Generator, place: int) -> tuple[Item, int]:
            number = int(self._numbers[place])
            return (number,), int(self._corpus.lengths[number])

        return plan_whole(rows, self._seq_len, len(self._numbers), key, draw)

    def build(self, item: Item, key: Key) -> TokenSequence:
        """See :class:`~lwm_data.sources.base.Source`."""
        return self._corpus.sequence(int(item[0]))
