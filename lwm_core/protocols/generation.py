"""Generation and scoring with what a trainer holds; token-in token-out, natural order.

A *guided* session (classifier-free guidance, arXiv 2207.12598) has two rows, decoded as one batch: the conditional one,
which is the session's, and an unconditional one, whose prompt lacks the condition. A token is drawn once, from the
logits of both, and both rows go on with it.

In a run of several processes each call is made on all of them in step, with the same arguments, and gives the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lwm_core.errors import ShapeError, UnsupportedError
from lwm_core.vocab import Vocabulary


@dataclass(frozen=True)
class SamplingSpec:
    """How tokens are drawn.

    Args:
        max_new_tokens: tokens written at most.
        temperature: 0 is greedy.
        top_k: keep the k likeliest; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probability reaches it.
        min_p: keep the tokens that are at least so many times as probable as the likeliest (arXiv 2407.01082); 0 keeps
            all. All of these are taken at the given temperature, top-k first, min-p last.
        stop_ids: ids that end a row; the stop id itself is not returned.
        seed: seed of the draw.
        modality: vocabulary slice that is drawn from.
        ids: of that slice, the ids ``[start, stop)`` that are drawn from (codes, without their delimiters); none: all.
            Everything else is as if the others were not there.
        guidance: s of a guided session, whose logits are ``u + s·(c − u)`` for c the conditional and u the
            unconditional ones, before all of the above. 1 draws what the conditional row alone would, 0 what the other
            one would, bit for bit of the logits. An unguided session knows 1 alone.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_ids: tuple[int, ...] = ()
    seed: int = 0
    modality: str = "text"
    ids: tuple[int, int] | None = None
    guidance: float = 1.0

    def drawn_ids(self, vocabulary: Vocabulary, *, guided: bool = False) -> slice:
        """The ids that are drawn from.

        Args:
            vocabulary: the model's.
            guided: whether there is an unconditional row.

        Raises:
            ShapeError: the model has no such modality, or ``ids`` are none of its.
            UnsupportedError: ``guidance`` is asked for where there is no unconditional row.
        """
        if not guided and self.guidance != 1.0:
            raise UnsupportedError(
                f"generate: guidance is {self.guidance:g}, but there is no unconditional row; open session(guided=True)"
            )
        if self.modality not in vocabulary.slices:
            raise ShapeError(f"generate: modality {self.modality!r} is not in this model's vocabulary")
        whole = vocabulary.slices[self.modality]
        start, stop = (whole.start, whole.stop) if self.ids is None else self.ids
        if not whole.start <= start < stop <= whole.stop:
            raise ShapeError(
                f"generate: ids are [{start}, {stop}); expected some of modality {self.modality!r}, "
                f"[{whole.start}, {whole.stop})"
            )
        return slice(start, stop)


class Session(Protocol):
    """One conversation: what was read and written stays in the cache, so that only what is new is computed.

    It belongs to the parameters and the stage that it was opened with, and ends with them: not to be used after another
    step. Wrong use is told by the call or, of :meth:`stream`, with the first token.
    """

    @property
    def tokens(self) -> Sequence[int]:
        """All that was read and written, in order; of a guided session by the conditional row."""
        ...

    def read(self, tokens: Sequence[int], unconditional: Sequence[int] | None = None, *, expected: int = 0) -> None:
        """Append tokens, at least one.

        Args:
            tokens: of a guided session for the conditional row.
            unconditional: what a guided session's other row reads instead, at least one; the same if none.
            expected: tokens that will follow soon, for which room may be made at once.

        Raises:
            ShapeError: there is none, or an id outside the vocabulary.
            LwmError: the session was closed.
            UnsupportedError: it is not guided, and ``unconditional`` is given.
        """
        ...

    def stream(self, sampling: SamplingSpec) -> Iterator[int]:
        """Write: new tokens after all that was read, as they come; after ``read(P)`` those of ``Generator.stream(P)``.

        Those that were given join the session, a stop id does not. Whoever leaves early (closes the iterator) leaves a
        usable session that holds exactly the tokens it was given. One stream at a time: close it before going on.

        Raises:
            ShapeError: nothing was read yet, or the model has no such modality or ids.
            LwmError: the session was closed.
            UnsupportedError: it is not guided, and ``sampling.guidance`` is not 1.
        """
        ...

    def unguide(self) -> None:
        """Go on without the unconditional row, if there is one, and give back what it took; nothing is read again.

        Raises:
            LwmError: the session was closed.
        """
        ...

    def close(self) -> None:
        """Drop the cache."""
        ...


class Generator(Protocol):
    """Token-in, token-out generation, natural order."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingSpec) -> list[list[int]]:
        """New tokens for each prompt; prompts may differ in length."""
        ...

    def stream(self, prompt: Sequence[int], sampling: SamplingSpec) -> Iterator[int]:
        """New tokens of one prompt, as they come."""
        ...

    def session(self, *, guided: bool = False) -> Session:
        """A conversation, of which nothing was read yet; ``guided``: with an unconditional row beside it."""
        ...


class Scorer(Protocol):
    """Teacher-forced scores."""

    def log_likelihood(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """``[N-1]`` natural-log probability of each token after the first."""
        ...
