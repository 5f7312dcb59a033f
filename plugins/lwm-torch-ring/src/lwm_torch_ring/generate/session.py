"""One conversation: what was read and written stays in the cache; every rank asks it the same at the same time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lwm_core.errors import LwmError, ShapeError
from lwm_core.protocols import SamplingSpec
from lwm_torch_ring.generate.batch import Draw
from lwm_torch_ring.generate.prompts import Prompts, check_ids, ids_of

if TYPE_CHECKING:
    from lwm_torch_ring.train.trainer import TorchTrainer


class TorchSession:
    """See ``lwm_core.protocols.Session``."""

    def __init__(self, trainer: TorchTrainer) -> None:
        self._trainer = trainer
        self._row: Prompts | None = Prompts(trainer, 1)
        self._tokens: list[int] = []
        self._cached = 0
        self._turn = 0

    @property
    def tokens(self) -> Sequence[int]:
        """All that was read and written, in order."""
        return tuple(self._tokens)

    def read(self, tokens: Sequence[int]) -> None:
        """Append tokens, at least one; see ``lwm_core.protocols.Session``."""
        self._usable()
        check_ids([tokens], self._trainer.context.model.vocabulary)
        self._turn += 1
        self._tokens += [int(token) for token in tokens]
        self._catch_up()

    def stream(self, sampling: SamplingSpec) -> Iterator[int]:
        """New tokens, as they come; see ``lwm_core.protocols.Session``."""
        self._usable()
        if not self._tokens:
            raise ShapeError("generate: nothing was read yet; read at least 1 token before the first is written")
        ids = ids_of(sampling, self._trainer.context.model.vocabulary)
        self._turn += 1
        return self._written(sampling, Draw(sampling, ids, 1), self._turn)

    def _written(self, sampling: SamplingSpec, draw: Draw, turn: int) -> Iterator[int]:
        with self._trainer.gathering():
            for _ in range(sampling.max_new_tokens):
                row = self._usable()
                if turn != self._turn:
                    raise LwmError("generate: its session went on without this stream; close a stream before that")
                self._catch_up()
                [token] = row.draw(draw)
                if token in sampling.stop_ids:
                    return
                self._tokens.append(token)
                yield token

    def _catch_up(self) -> None:
        """Read what is not in the cache yet: the last token that was written is not."""
        row, coming = self._usable(), self._tokens[self._cached :]
        if not coming:
            return
        try:
            row.read([coming])
        except BaseException:
            self.close()  # some layers may have more in their caches than others
            raise
        self._cached = len(self._tokens)

    def _usable(self) -> Prompts:
        if self._row is None:
            raise LwmError("generate: this session was closed; open another")
        return self._row

    def close(self) -> None:
        """Drop the cache."""
        self._row = None
