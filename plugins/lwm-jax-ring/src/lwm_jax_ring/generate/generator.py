"""Token-in, token-out generation, natural order; in several processes all call it at the same time.

Shapes: B rows, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lwm_core.mesh import data_ranks
from lwm_core.protocols import SamplingSpec
from lwm_jax_ring.generate.programs import Programs
from lwm_jax_ring.generate.reading import rounded
from lwm_jax_ring.generate.rows import Rows
from lwm_jax_ring.generate.score import Scorer
from lwm_jax_ring.generate.session import JaxSession, check

if TYPE_CHECKING:
    from lwm_jax_ring.train.trainer import JaxTrainer


class JaxGenerator:
    """Generation and scoring with a trainer's parameters and RoPE, as they are when it is called."""

    def __init__(self, trainer: JaxTrainer) -> None:
        self._trainer = trainer
        self._programs = Programs(trainer)
        self._scorer = Scorer(trainer)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingSpec) -> list[list[int]]:
        """New tokens for each prompt; see ``lwm_core.protocols.Generator``."""
        found: list[list[int]] = [[] for _ in prompts]
        if not prompts or sampling.max_new_tokens < 1:
            return found
        model = self._trainer.context.model
        check(prompts, sampling, model.vocabulary)
        count = rounded(len(prompts), data_ranks(dict(self._trainer.mesh.shape)))
        rows = Rows(self._trainer, self._programs, count)
        rows.read([*prompts, *[prompts[-1]] * (count - len(prompts))], sampling.max_new_tokens)
        done = [False] * len(prompts)
        for tokens in rows.write(sampling):
            for b, token in enumerate(tokens[: len(prompts)]):
                done[b] = done[b] or token in sampling.stop_ids
                if not done[b]:
                    found[b].append(token)
            if all(done):
                break
        return found

    def stream(self, prompt: Sequence[int], sampling: SamplingSpec) -> Iterator[int]:
        """New tokens of one prompt, as they come."""
        session = self.session()
        session.read(prompt, expected=sampling.max_new_tokens)
        return session.stream(sampling)

    def session(self, *, guided: bool = False) -> JaxSession:
        """A conversation whose cache is kept; ``guided``: with an unconditional row beside it."""
        return JaxSession(self._trainer, self._programs, guided)

    def log_likelihood(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """``[N-1]``; see ``lwm_core.protocols.Scorer``."""
        return self._scorer.log_likelihood(tokens)
