"""How a sequence is dealt to the ranks of ``sp``: a permutation, its inverse, and what lengths must divide into.

Rank r of n holds slots ``[r·S/n, (r+1)·S/n)`` of the permuted sequence; ``permutation[slot]`` is the natural index of
the token in that slot. Everything that depends on order asks here; nothing infers order from a slot.

* ``contiguous``: slot = index. Simple; with a causal mask the last rank has twice the mean work.
* ``zigzag``: the sequence is cut into 2n chunks and rank r takes chunks r and 2n−1−r, which evens causal work out.
* ``striped``: rank r takes indices r, r+n, r+2n, ... (Striped Attention, arXiv 2311.09431).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lwm_core.errors import ShapeError, UnsupportedError

LayoutKind = Literal["contiguous", "zigzag", "striped"]
LAYOUTS: tuple[str, ...] = get_args(LayoutKind)


@dataclass(frozen=True)
class SequenceLayout:
    """The layout ``kind`` of a sequence over ``world`` ranks.

    Raises:
        UnsupportedError: the kind is not one of :data:`LAYOUTS`.
        ShapeError: ``world`` is not positive.
    """

    kind: LayoutKind
    world: int = 1

    def __post_init__(self) -> None:
        if self.kind not in LAYOUTS:
            raise UnsupportedError(f"layout {self.kind!r} is unknown; expected one of {', '.join(LAYOUTS)}")
        if self.world < 1:
            raise ShapeError(f"layout {self.kind!r}: world is {self.world}; expected at least 1 rank")

    @property
    def multiple(self) -> int:
        """What a length must be a multiple of."""
        return 2 * self.world if self.kind == "zigzag" and self.world > 1 else self.world

    def check(self, seq_len: int) -> None:
        """Raise :class:`ShapeError` unless ``seq_len`` can be dealt evenly."""
        if seq_len < 1 or seq_len % self.multiple:
            near = max(1, round(seq_len / self.multiple)) * self.multiple
            raise ShapeError(
                f"layout {self.kind!r} over {self.world} ranks: sequence length {seq_len} is not a multiple of "
                f"{self.multiple}; use {near}"
            )

    def permutation(self, seq_len: int) -> NDArray[np.int32]:
        """``[S]`` int32: the natural index of the token in each slot. ``permuted = natural[permutation]``."""
        self.check(seq_len)
        index = np.arange(seq_len, dtype=np.int32)
        if self.world == 1 or self.kind == "contiguous":
            return index
        if self.kind == "striped":
            return index.reshape(-1, self.world).T.reshape(-1)
        chunks = index.reshape(2 * self.world, -1)
        order = [c for r in range(self.world) for c in (r, 2 * self.world - 1 - r)]
        return chunks[order].reshape(-1)

    def inverse(self, seq_len: int) -> NDArray[np.int32]:
        """``[S]`` int32: the slot of each natural index. ``natural = permuted[inverse]``."""
        permutation = self.permutation(seq_len)
        inverse = np.empty_like(permutation)
        inverse[permutation] = np.arange(seq_len, dtype=np.int32)
        return inverse

    def rank_indices(self, seq_len: int, rank: int) -> NDArray[np.int32]:
        """``[S/world]`` int32: the natural indices of the tokens that ``rank`` holds, in slot order."""
        if not 0 <= rank < self.world:
            raise ShapeError(f"layout {self.kind!r}: rank {rank} is not one of {self.world}")
        indices: NDArray[np.int32] = self.permutation(seq_len).reshape(self.world, -1)[rank]
        return indices

    def runs(self, seq_len: int) -> list[list[slice]]:
        """For each rank, the natural-index slices that make up its slots in order (strided where striped)."""
        self.check(seq_len)
        if self.kind == "striped" and self.world > 1:
            return [[slice(rank, seq_len, self.world)] for rank in range(self.world)]
        parts = 2 if self.kind == "zigzag" and self.world > 1 else 1
        size = seq_len // (parts * self.world)
        found = []
        for rank in range(self.world):
            chunks = (rank, 2 * self.world - 1 - rank) if parts == 2 else (rank,)
            found.append([slice(c * size, (c + 1) * size) for c in chunks])
        return found
