"""Generation and scoring with what a trainer holds; token-in token-out, natural order.

In a run of several processes each call is made on all of them in step, with the same arguments, and gives the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


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
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_ids: tuple[int, ...] = ()
    seed: int = 0
    modality: str = "text"


class Session(Protocol):
    """One conversation: what was read and written stays in the cache, so that only what is new is computed.

    It belongs to the parameters and the stage that it was opened with, and ends with them: not to be used after another
    step. Wrong use is told by the call or, of :meth:`stream`, with the first token.
    """

    @property
    def tokens(self) -> Sequence[int]:
        """All that was read and written, in order."""
        ...

    def read(self, tokens: Sequence[int]) -> None:
        """Append tokens, at least one.

        Raises:
            ShapeError: there is none, or an id outside the vocabulary.
            LwmError: the session was closed.
        """
        ...

    def stream(self, sampling: SamplingSpec) -> Iterator[int]:
        """Write: new tokens after all that was read, as they come; after ``read(P)`` those of ``Generator.stream(P)``.

        Those that were given join the session, a stop id does not. Whoever leaves early (closes the iterator) leaves a
        usable session that holds exactly the tokens it was given. One stream at a time: close it before going on.

        Raises:
            ShapeError: nothing was read yet, or the model has no such modality.
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

    def session(self) -> Session:
        """A conversation, of which nothing was read yet."""
        ...


class Scorer(Protocol):
    """Teacher-forced scores."""

    def log_likelihood(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """``[N-1]`` natural-log probability of each token after the first."""
        ...
