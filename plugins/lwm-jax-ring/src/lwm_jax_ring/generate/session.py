"""One conversation: what was read and written stays in the cache.

Shapes: B rows, all the same: one for each data rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lwm_core.errors import LwmError, ShapeError
from lwm_core.mesh import data_ranks
from lwm_core.protocols import SamplingSpec
from lwm_core.vocab import Vocabulary
from lwm_jax_ring.generate.programs import Programs
from lwm_jax_ring.generate.rows import Rows

if TYPE_CHECKING:
    from lwm_jax_ring.train.trainer import JaxTrainer


class JaxSession:
    """See ``lwm_core.protocols.Session``."""

    def __init__(self, trainer: JaxTrainer, programs: Programs) -> None:
        self._vocabulary = trainer.context.model.vocabulary
        self._count = data_ranks(dict(trainer.mesh.shape))
        self._rows: Rows | None = Rows(trainer, programs, self._count)
        self._tokens: list[int] = []
        self._cached = 0

    @property
    def tokens(self) -> Sequence[int]:
        """All that was read and written, in order."""
        return tuple(self._tokens)

    def read(self, tokens: Sequence[int], expected: int = 0) -> None:
        """Append tokens, at least one; see ``lwm_core.protocols.Session``. ``expected`` more will be written soon."""
        self._open()
        check([tokens], None, self._vocabulary)
        self._tokens += [int(token) for token in tokens]
        self._catch_up(expected)

    def stream(self, sampling: SamplingSpec) -> Iterator[int]:
        """New tokens, as they come; see ``lwm_core.protocols.Session``."""
        self._open()
        if not self._tokens:
            raise ShapeError("generate: nothing was read yet; expected at least 1 token before the first is written")
        check([], sampling, self._vocabulary)
        return self._written(sampling)

    def _written(self, sampling: SamplingSpec) -> Iterator[int]:
        if sampling.max_new_tokens < 1:
            return
        self._catch_up()
        rows = self._open()
        for found in rows.write(sampling):
            self._cached = rows.lengths[0]
            if found[0] in sampling.stop_ids:
                return
            self._tokens.append(found[0])
            yield found[0]

    def _catch_up(self, expected: int = 0) -> None:
        """Read what is not in the cache yet: the last token that was written is not."""
        rows, coming = self._open(), self._tokens[self._cached :]
        if coming:
            rows.read([coming] * self._count, expected)
            self._cached = rows.lengths[0]

    def _open(self) -> Rows:
        if self._rows is None:
            raise LwmError("generate: this session was closed; open another")
        return self._rows

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
    if sampling is not None and sampling.modality not in vocabulary.slices:
        raise ShapeError(f"generate: modality {sampling.modality!r} is not in this model's vocabulary")
