"""Rows dealt to the data ranks: each reads its own, and all know every token that is drawn.

Every rank calls the same at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lwm_core.errors import ShapeError
from lwm_core.mesh import data_ranks
from lwm_core.vocab import Vocabulary
from lwm_torch_ring.generate.batch import Draw, Rows, every_rank, rounded
from lwm_torch_ring.train.heartbeat import naming_the_lost

if TYPE_CHECKING:
    from lwm_torch_ring.train.trainer import TorchTrainer


class Prompts:
    """Rows of all data ranks, and what may follow them. Where they do not divide, the last one fills up.

    Args:
        trainer: whose model, as it is now.
        count: rows.
        group: rows that stand together, and go to the same data rank.
    """

    def __init__(self, trainer: TorchTrainer, count: int, group: int = 1) -> None:
        self._trainer, self.count, self._group = trainer, count, group
        data, world = trainer.current.place.data_rank
        self._share = rounded(count, group * world) // world
        self._first = data * self._share
        self._rows = Rows(trainer, self._share)
        self._logits: Tensor | None = None

    def read(self, rows: Sequence[Sequence[int]]) -> None:
        """Append tokens to every row, at least one each."""
        last = rows[-self._group :]
        padded = [*rows, *[*last] * self._share * data_ranks(self._trainer.current.place.sizes)]
        mine, longest = padded[self._first : self._first + self._share], max(map(len, rows))
        with reading(self._trainer), self._trainer.gathering():
            if longest == 1:
                self._logits = self._rows.write([token for (token,) in mine])
            else:
                self._logits = self._rows.read(mine, longest)

    def keep_firsts(self) -> None:
        """Of each group of rows, keep the first alone."""
        self._rows.keep(slice(0, None, self._group))
        if self._logits is not None:
            self._logits = self._logits[:: self._group]
        self.count, self._share, self._first = (size // self._group for size in (self.count, self._share, self._first))
        self._group = 1

    def draw(self, draw: Draw) -> list[int]:
        """A token that may follow each row, or each pair, as the first rank of each data rank drew it; not read yet."""
        assert self._logits is not None
        with reading(self._trainer):
            of_ranks = every_rank(draw.tokens(self._logits, self._first))
        sizes = self._trainer.current.place.sizes
        firsts = [ranks_of_row(self._trainer, data)[0] for data in range(data_ranks(sizes))]
        return [int(token) for rank in firsts for token in of_ranks[rank]][: self.count]


@contextmanager
def reading(trainer: TorchTrainer) -> Iterator[None]:
    """Around every call of the model, and no ``yield``: the caller's gradients are the caller's affair."""
    with naming_the_lost(trainer.heart), torch.no_grad():
        yield


def ranks_of_row(trainer: TorchTrainer, data_rank: int) -> list[int]:
    """The ranks that hold a data rank's tokens, in their order: by ``sp``, and by ``tp`` within."""
    sizes = trainer.current.place.sizes
    tp, sp = sizes["tp"], sizes["sp"]
    first = data_rank * tp * sp
    return list(range(first, first + sp * tp))


def check_ids(prompts: Sequence[Any], vocabulary: Vocabulary, at_least: int = 1) -> None:
    """Raise ShapeError for a prompt that is too short or holds what is no token."""
    for number, prompt in enumerate(prompts):
        if len(prompt) < at_least:
            raise ShapeError(f"generate: prompt {number} has {len(prompt)} tokens; expected at least {at_least}")
        if min(prompt) < 0 or max(prompt) >= vocabulary.size:
            raise ShapeError(f"generate: prompt {number} holds ids outside [0, {vocabulary.size})")
