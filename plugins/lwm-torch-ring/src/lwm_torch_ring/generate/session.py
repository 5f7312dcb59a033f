"""One conversation: what was read and written stays in the cache; every rank asks it the same at the same time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lwm_core.errors import LwmError, ShapeError, UnsupportedError
from lwm_core.protocols import SamplingSpec
from lwm_torch_ring.generate.batch import Draw
from lwm_torch_ring.generate.prompts import Prompts, check_ids

if TYPE_CHECKING:
    from lwm_torch_ring.train.trainer import TorchTrainer


class TorchSession:
    """See ``lwm_core.protocols.Session``."""

    def __init__(self, trainer: TorchTrainer, guided: bool = False) -> None:
        self._trainer, self._guided = trainer, guided
        self._texts: list[list[int]] = [[], []] if guided else [[]]
        self._row: Prompts | None = Prompts(trainer, len(self._texts), group=len(self._texts))
        self._cached = [0] * len(self._texts)
        self._turn = 0

    @property
    def tokens(self) -> Sequence[int]:
        """All that was read and written, in order."""
        return tuple(self._texts[0])

    def read(self, tokens: Sequence[int], unconditional: Sequence[int] | None = None, *, expected: int = 0) -> None:
        """Append tokens, at least one; see ``lwm_core.protocols.Session``. Room is made as it is needed."""
        self._usable()
        if unconditional is not None and not self._guided:
            raise UnsupportedError("generate: this session has no unconditional row; open session(guided=True)")
        coming = [tokens, tokens if unconditional is None else unconditional][: len(self._texts)]
        check_ids(coming, self._trainer.context.model.vocabulary)
        self._turn += 1
        for text, new in zip(self._texts, coming, strict=True):
            text += [int(token) for token in new]
        self._catch_up()

    def stream(self, sampling: SamplingSpec) -> Iterator[int]:
        """New tokens, as they come; see ``lwm_core.protocols.Session``."""
        self._usable()
        if not self._texts[0]:
            raise ShapeError("generate: nothing was read yet; read at least 1 token before the first is written")
        ids = sampling.drawn_ids(self._trainer.context.model.vocabulary, guided=self._guided)
        self._turn += 1
        return self._written(sampling, Draw(sampling, ids, 1, self._guided), self._turn)

    def _written(self, sampling: SamplingSpec, draw: Draw, turn: int) -> Iterator[int]:
        with self._trainer.gathering():
            for _ in range(sampling.max_new_tokens):
                row = self._usable()
                if turn != self._turn:
                    raise LwmError("generate: its session went on without this stream; close a stream before that")
                self._catch_up()
                token = row.draw(draw)[0]
                if token in sampling.stop_ids:
                    return
                for text in self._texts:
                    text.append(token)
                yield token

    def _catch_up(self) -> None:
        """Read what is not in the cache yet: the last token that was written is not."""
        row = self._usable()
        coming = [text[have:] for text, have in zip(self._texts, self._cached, strict=True)]
        if not coming[0]:
            return
        try:
            row.read(coming)
        except BaseException:
            self.close()  # some layers may have more in their caches than others
            raise
        self._cached = [len(text) for text in self._texts]

    def _usable(self) -> Prompts:
        if self._row is None:
            raise LwmError("generate: this session was closed; open another")
        return self._row

    def unguide(self) -> None:
        """Go on without the unconditional row; see ``lwm_core.protocols.Session``."""
        row = self._usable()
        if self._guided:
            row.keep_firsts()
            self._turn += 1
            self._texts, self._cached, self._guided = self._texts[:1], self._cached[:1], False

    def close(self) -> None:
        """Drop the cache."""
        self._row = None
