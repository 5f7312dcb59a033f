"""One conversation: what was read and written stays in the cache.

Shapes: B rows: one for each data rank, or a pair where it is guided; all ranks' are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lwm_core.errors import LwmError, ShapeError, UnsupportedError
from lwm_core.mesh import data_ranks
from lwm_core.protocols import SamplingSpec
from lwm_core.vocab import Vocabulary
from lwm_jax_ring.generate.programs import Programs
from lwm_jax_ring.generate.rows import Rows

if TYPE_CHECKING:
    from lwm_jax_ring.train.trainer import JaxTrainer


class JaxSession:
    """See ``lwm_core.protocols.Session``."""

    def __init__(self, trainer: JaxTrainer, programs: Programs, guided: bool = False) -> None:
        self._vocabulary, self._guided = trainer.context.model.vocabulary, guided
        self._copies = data_ranks(dict(trainer.mesh.shape))
        self._texts: list[list[int]] = [[], []] if guided else [[]]
        self._rows: Rows | None = Rows(trainer, programs, self._copies * len(self._texts), guided)

    @property
    def tokens(self) -> Sequence[int]:
        """All that was read and written, in order."""
        return tuple(self._texts[0])

    def read(self, tokens: Sequence[int], unconditional: Sequence[int] | None = None, *, expected: int = 0) -> None:
        """Append tokens, at least one; see ``lwm_core.protocols.Session``."""
        self._open()
        if unconditional is not None and not self._guided:
            raise UnsupportedError("generate: this session has no unconditional row; open session(guided=True)")
        coming = [tokens, tokens if unconditional is None else unconditional][: len(self._texts)]
        check(coming, None, self._vocabulary)
        for text, new in zip(self._texts, coming, strict=True):
            text += [int(token) for token in new]
        self._catch_up(expected)

    def stream(self, sampling: SamplingSpec) -> Iterator[int]:
        """New tokens, as they come; see ``lwm_core.protocols.Session``."""
        self._open()
        if not self._texts[0]:
            raise ShapeError("generate: nothing was read yet; expected at least 1 token before the first is written")
        sampling.drawn_ids(self._vocabulary, guided=self._guided)
        return self._written(sampling)

    def _written(self, sampling: SamplingSpec) -> Iterator[int]:
        if sampling.max_new_tokens < 1:
            return
        self._catch_up()
        rows = self._open()
        for found in rows.write(sampling):
            token = found[0]
            if token in sampling.stop_ids:
                return
            for text in self._texts:
                text.append(token)
            yield token

    def _catch_up(self, expected: int = 0) -> None:
        """Read what is not in the cache yet: the last token that was written is not."""
        rows = self._open()
        coming = [text[have:] for text, have in zip(self._texts, rows.lengths, strict=False)]
        if coming[0]:
            rows.read(coming * self._copies, expected)

    def _open(self) -> Rows:
        if self._rows is None:
            raise LwmError("generate: this session was closed; open another")
        return self._rows

    def unguide(self) -> None:
        """Go on without the unconditional row; see ``lwm_core.protocols.Session``."""
        self._open().unguide()
        self._texts, self._guided = self._texts[:1], False

    def close(self) -> None:
        """Drop the cache."""
        self._rows = None


def check(prompts: Sequence[Sequence[int]], sampling: SamplingSpec | None, vocabulary: Vocabulary) -> None:
    """Refuse prompts and modalities that the model cannot have."""
    for number, prompt in enumerate(prompts):
        if len(prompt) < 1:
            raise ShapeError(f"generate: prompt {number} has 0 tokens; expected at least 1")
        if min(prompt) < 0 or max(prompt) >= vocabulary.size:
            raise ShapeError(f"generate: prompt {number} holds ids outside [0, {vocabulary.size})")
    if sampling is not None:
        sampling.drawn_ids(vocabulary)
