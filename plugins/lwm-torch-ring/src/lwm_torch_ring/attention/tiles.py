"""What a kernel is asked for at once: one tile, or tiles of packed documents in one call.

Shapes: B batch, C tokens of a rank, n tiles of a pack.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Kind = Literal["whole", "diagonal", "ragged"]
Ints = NDArray[np.int64]

OPEN_PACKS = 8
"""Packs of one kind that a tile is tried on; one that fits none of them is computed by itself."""


@dataclass(frozen=True, eq=False)
class Tile:
    """Queries ``q`` over keys ``k`` of rows ``rows``: slots of the rank that has the queries, and of the keys' rank.

    ``diagonal``: as many queries as keys, and each sees the keys up to the one in its own place. ``ragged``: query i
    sees the keys ``low[i] <= j < high[i]``, counted from ``k.start``.
    """

    rows: slice
    q: slice
    k: slice
    kind: Kind
    low: Ints | None = None
    high: Ints | None = None

    @property
    def unseeing(self) -> NDArray[np.bool_] | None:
        """Which queries see no key of a ragged tile; none where all see one."""
        if self.low is None or self.high is None:
            return None
        nothing: NDArray[np.bool_] = self.high <= self.low
        return nothing if nothing.any() else None


class Spans(NamedTuple):
    """Where sequences begin and end in tensors that hold them one after the other."""

    q: Tensor  # [n+1] int32, from 0
    k: Tensor  # [n+1] int32, from 0
    longest_q: int
    longest_k: int


class Placed(NamedTuple):
    """A pack on a device."""

    q: Tensor | slice  # int64, which of the B·C queries, by rows
    k: Tensor | slice  # int64, which of the B·C keys, by rows
    spans: Spans


@dataclass(frozen=True, eq=False)
class Pack:
    """Tiles of one kind, whole or diagonal, that have no query and no key in common: the sequences of one call.

    Args:
        kind: of all of them.
        parts: their queries and keys among B·C tokens, by rows.
    """

    kind: Kind
    parts: tuple[tuple[slice, slice], ...]
    _placed: dict[torch.device, Placed] = field(default_factory=dict, repr=False)

    def on(self, device: torch.device) -> Placed:
        """Brought to ``device`` once, for all layers."""
        if device not in self._placed:
            (q, q_edges), (k, k_edges) = (_gathered(side) for side in zip(*self.parts, strict=True))
            edges = (torch.from_numpy(x.astype(np.int32)).to(device) for x in (q_edges, k_edges))
            longest = (int(np.diff(x).max()) for x in (q_edges, k_edges))
            places = (x if isinstance(x, slice) else torch.from_numpy(x).to(device) for x in (q, k))
            self._placed[device] = Placed(*places, Spans(*edges, *longest))
        return self._placed[device]


def _gathered(parts: tuple[slice, ...]) -> tuple[Ints | slice, Ints]:
    """The tokens of all parts, as a slice where they stand together, and where each part begins and ends."""
    edges = np.cumsum([0, *(part.stop - part.start for part in parts)])
    if all(left.stop == right.start for left, right in pairwise(parts)):
        return slice(parts[0].start, parts[-1].stop), edges
    return np.concatenate([np.arange(part.start, part.stop) for part in parts]), edges


def packs(tiles: Iterable[Tile], rows: int, tokens: int) -> list[Tile | Pack]:
    """Tiles of B = ``rows`` rows of C = ``tokens`` with those packed that can be; one alone of its kind stays a tile.

    A pack takes a tile that begins after its last one ends, in queries and in keys, so that what is gathered for it is
    never more than the rank's own queries and keys.
    """
    alone: list[Tile | Pack] = []
    found: list[list[Tile]] = []
    opened: dict[Kind, list[list[Tile]]] = {"whole": [], "diagonal": []}
    for tile in sorted(tiles, key=lambda tile: (tile.rows.start or 0, tile.q.start, tile.k.start)):
        if tile.kind == "ragged":
            alone.append(tile)
            continue
        here = opened[tile.kind]
        fitting = next((pack for pack in here if _follows(tile, pack[-1])), None)
        if fitting is not None:
            fitting.append(tile)
        else:
            found.append([tile])
            here.append(found[-1])
            if len(here) > OPEN_PACKS:
                here.pop(0)
    alone += [pack[0] for pack in found if len(pack) == 1]
    return alone + [_pack(pack, rows, tokens) for pack in found if len(pack) > 1]


def _follows(tile: Tile, last: Tile) -> bool:
    if tile.rows != last.rows:
        return True  # tiles come row by row
    return tile.q.start >= last.q.stop and tile.k.start >= last.k.stop


def _pack(tiles: list[Tile], rows: int, tokens: int) -> Pack:
    def shifted(part: slice, row: int) -> slice:
        return slice(row * tokens + part.start, row * tokens + part.stop)

    # All tiles of a plan are of one row each, or all of all rows, which then are alike.
    every = range(*tiles[0].rows.indices(rows)) if tiles[0].rows == slice(None) else None
    placed = (
        ((row, tile) for row in every for tile in tiles) if every is not None
        else ((tile.rows.start, tile) for tile in tiles)
    )  # fmt: skip
    return Pack(tiles[0].kind, tuple((shifted(tile.q, row), shifted(tile.k, row)) for row, tile in placed))
