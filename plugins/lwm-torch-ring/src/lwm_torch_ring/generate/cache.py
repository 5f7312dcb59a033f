"""The KV cache of one layer on one rank: rows grow a page at a time, and full pages may be kept in eight bits.

A row holds its own tokens and nothing else: padding never gets in. So a row's slots are whole tiles to any query that
comes later, and nothing needs a mask or an order.

Shapes: B rows, T slots, N pages, P slots of a page, K key-value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

PAGE = 128
"""Slots of a page."""

CacheDtype = Literal["compute", "bfloat16", "int8"]


class Rows:
    """Keys or values of a layer: T slots a row, of which row b has ``used[b]`` in use.

    They are kept heads first, so that a query that reads all of a head's slots reads them in order.

    Args:
        kind: how they are kept. ``int8`` keeps full pages as whole numbers times a float32 scale for each page and
            head, and the last, unfinished page of a row as it came.
    """

    def __init__(self, kind: CacheDtype) -> None:
        self._kind = kind
        self._plain: Tensor | None = None  # all slots [B, K, T, D], or with int8 those of unfinished pages [B, K, P, D]
        self._codes: Tensor | None = None  # [B, K, N, P, D] int8
        self._scales: Tensor | None = None  # [B, K, N, 1, 1] float32
        self._dtype = torch.float32
        self.used: list[int] = []

    def add(self, x: Tensor, chosen: Sequence[Tensor | None]) -> None:
        """Put away, at the end of each row b, its slots ``chosen[b]`` of ``x [B, c, K, D]``; all of them if none."""
        self._dtype = x.dtype
        kept = (x.bfloat16() if self._kind == "bfloat16" else x).transpose(1, 2)
        if not self.used:
            self.used = [0] * len(x)
            self._room(PAGE, kept[0])
        for row, which in enumerate(chosen):
            self._put(row, kept[row] if which is None else kept[row].index_select(1, which))

    def append(self, x: Tensor, here: bool) -> None:
        """Put away one slot of each row, ``x [B, K, D]``, if it is ``here`` that it is kept."""
        if here and self._plain is not None and self._kind != "int8" and min(self.used) == max(self.used):
            slot, self._dtype = self.used[0], x.dtype
            if slot == self._plain.shape[2]:
                self._room(slot + 1, self._plain[0])
            self._plain.select(2, slot).copy_(x)
            self.used = [slot + 1] * len(self.used)
        elif here or not self.used:
            nothing = torch.zeros(0, dtype=torch.long, device=x.device)
            self.add(x[:, None], [None if here else nothing] * len(x))

    def _put(self, row: int, new: Tensor) -> None:
        """``new [K, c, D]`` at the end of a row."""
        while count := new.shape[1]:
            at = self.used[row] % PAGE if self._kind == "int8" else self.used[row]
            taken = min(count, PAGE - at) if self._kind == "int8" else count
            part, new = new[:, :taken], new[:, taken:]
            plain = self._room(at + taken, part)
            plain[row, :, at : at + taken] = part
            self.used[row] += taken
            if self._kind == "int8" and self.used[row] % PAGE == 0:
                self._pack(row, self.used[row] // PAGE - 1, plain[row, :, :PAGE])

    def _room(self, slots: int, like: Tensor) -> Tensor:
        """The plain slots, at least so many: doubled when they are full, so that copying stays rare."""
        have = 0 if self._plain is None else self._plain.shape[2]
        if self._plain is None or have < slots:
            pages = -(-max(slots, 0 if self._kind == "int8" else 2 * have) // PAGE)
            grown = like.new_empty((len(self.used), like.shape[0], pages * PAGE, like.shape[2]))
            if self._plain is not None:
                grown[:, :, :have] = self._plain
            self._plain = grown
        return self._plain

    def _pack(self, row: int, page: int, slots: Tensor) -> None:
        """``slots [K, P, D]`` as a page of a row."""
        have = 0 if self._codes is None else self._codes.shape[2]
        if self._codes is None or self._scales is None or have <= page:
            heads, grown = (len(self.used), len(slots)), max(page + 1, 2 * have)
            codes = slots.new_empty((*heads, grown, *slots.shape[1:]), dtype=torch.int8)
            scales = slots.new_empty((*heads, grown, 1, 1), dtype=torch.float32)
            if self._codes is not None and self._scales is not None:
                codes[:, :, :have], scales[:, :, :have] = self._codes, self._scales
            self._codes, self._scales = codes, scales
        wide = slots.float()
        scale = (wide.abs().amax(dim=(1, 2), keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        self._codes[row, :, page] = (wide / scale).round().to(torch.int8)
        self._scales[row, :, page] = scale

    def keep(self, rows: slice) -> None:
        """Drop all rows but these."""
        self.used = self.used[rows]
        if self._plain is not None:
            self._plain = self._plain[rows].clone()
        if self._codes is not None and self._scales is not None:
            self._codes, self._scales = self._codes[rows].clone(), self._scales[rows].clone()

    def whole(self, slots: int, rows: slice = slice(None)) -> Tensor:
        """``[B, slots, K, D]``, a view of :meth:`by_heads`."""
        return self.by_heads(slots, rows).transpose(1, 2)

    def by_heads(self, slots: int, rows: slice = slice(None)) -> Tensor:
        """``[B, K, slots, D]`` in the dtype that came; of a row with fewer slots in use the rest means nothing."""
        assert self._plain is not None
        if self._codes is None or self._scales is None or self._kind != "int8":
            plain = self._plain if rows == slice(None) else self._plain[rows]
            return plain.narrow(2, 0, slots).to(self._dtype)
        pages = -(-slots // PAGE)
        codes, scales = self._codes[rows, :, :pages], self._scales[rows, :, :pages]
        opened = (codes.float() * scales).to(self._dtype).flatten(2, 3)
        if opened.shape[2] < slots:
            missing = opened.new_empty(*opened.shape[:2], slots - opened.shape[2], opened.shape[3])
            opened = torch.cat([opened, missing], dim=2)
        for place, row in enumerate(range(len(self.used))[rows]):
            full = self.used[row] // PAGE * PAGE
            rest = min(slots, self.used[row]) - full
            if rest > 0:
                opened[place, :, full : full + rest] = self._plain[row, :, :rest]
        return opened[:, :, :slots]

    @property
    def bytes(self) -> int:
        """What the slots in use take, scales and unfinished pages among it."""
        if self._plain is None:
            return 0
        heads, dim = self._plain.shape[1], self._plain.shape[3]
        slot = heads * dim * self._plain.element_size()
        if self._kind != "int8":
            return sum(self.used) * slot
        pages = sum(used // PAGE for used in self.used)
        return pages * (PAGE * heads * dim + 4 * heads) + sum(used % PAGE for used in self.used) * slot


class LayerCache:
    """Keys and values of one layer."""

    def __init__(self, kind: CacheDtype) -> None:
        self.k, self.v = Rows(kind), Rows(kind)

    @property
    def used(self) -> list[int]:
        """Slots in use of each row."""
        return self.k.used

    def add(self, k: Tensor, v: Tensor, chosen: Sequence[Tensor | None]) -> None:
        """Put away the chosen slots of ``k, v [B, c, K, D]``; see :meth:`Rows.add`."""
        self.k.add(k, chosen)
        self.v.add(v, chosen)

    def append(self, k: Tensor, v: Tensor, here: bool) -> None:
        """Put away one slot of each row of ``k, v [B, K, D]``; see :meth:`Rows.append`."""
        self.k.append(k, here)
        self.v.append(v, here)
