"""The global stream of a stage's rows, by number: a pure function of (seed, stage, row).

Rows are planned in windows of ``window_rows``: which source each row belongs to, and which pieces lie in it. A plan
holds lengths and places alone; tokens are laid out when a row is asked for.

Shapes: S tokens of a row.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from numpy.typing import NDArray

from lwm_core.batch import PackedBatch, pack_rows
from lwm_data.packing import share_out
from lwm_data.sources.base import Item, Key, Source, generator

FIELDS = tuple(field.name for field in fields(PackedBatch))
KEPT = 4
"""Plans that are kept: the windows that a batch and its successors lie in."""

Row = dict[str, NDArray[Any]]
"""The five arrays of a :class:`~lwm_core.batch.PackedBatch`, each ``[S]``."""


class StageRows:
    """Random access to the rows of a stage, on every data rank and in every worker alike."""

    def __init__(
        self, sources: Mapping[str, Source], weights: Mapping[str, float], key: Key, seq_len: int, window_rows: int
    ) -> None:
        """``key`` is (seed, stage)."""
        self._sources, self._weights, self._key = dict(sources), dict(weights), key
        self._seq_len, self._window_rows = seq_len, window_rows
        self._plans: dict[int, list[tuple[str, list[Item]]]] = {}

    def __getitem__(self, number: int) -> Row:
        window, place = divmod(number, self._window_rows)
        name, items = self._plan(window)[place]
        source, key = self._sources[name], self._source_key(window, name)
        batch = pack_rows([[source.build(item, key) for item in items]], self._seq_len)
        return {field: getattr(batch, field)[0] for field in FIELDS}

    def _plan(self, window: int) -> list[tuple[str, list[Item]]]:
        """Source and items of each row of a window; kept, since neighbouring rows share it."""
        plan = self._plans.get(window)
        if plan is None:
            names = share_out(self._weights, self._window_rows, generator((*self._key, window, 0)))
            rows = {
                name: iter(self._sources[name].plan(names.count(name), self._source_key(window, name)))
                for name in sorted(set(names))
            }
            plan = [(name, next(rows[name])) for name in names]
            for old in list(self._plans)[: max(0, len(self._plans) - KEPT + 1)]:
                self._plans.pop(old, None)
            self._plans[window] = plan
        return plan

    def _source_key(self, window: int, name: str) -> Key:
        # By name, not by place: a source added to the mix leaves the others' random numbers as they were.
        return (*self._key, window, zlib.crc32(name.encode()))


class RankRows:
    """The rows of one data rank in order, ``rows / world`` a step: what grain reads by index."""

    def __init__(self, rows: StageRows, per_step: int, rank: int, world: int) -> None:
        self._rows, self._per_step = rows, per_step
        self._own = per_step // world
        self._first = rank * self._own

    def __len__(self) -> int:
        return 1 << 48

    def __getitem__(self, index: int) -> Row:
        step, place = divmod(int(index), self._own)
        return self._rows[step * self._per_step + self._first + place]
