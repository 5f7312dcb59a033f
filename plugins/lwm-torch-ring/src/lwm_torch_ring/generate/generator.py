"""Token-in, token-out generation and scoring, natural order at the border; every rank calls it at the same time.

Rows are dealt to the data ranks, a row's tokens to the ranks of ``sp``.

Shapes: N tokens of a text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lwm_core.protocols import SamplingSpec
from lwm_torch_ring.generate.batch import CAUSAL, Draw, Slots, every_rank, how_to_read
from lwm_torch_ring.generate.memory import blocks_given_back
from lwm_torch_ring.generate.prompts import Prompts, check_ids, ranks_of_row, reading
from lwm_torch_ring.generate.session import TorchSession
from lwm_torch_ring.model.loss import log_likelihoods
from lwm_torch_ring.model.rope import rope_tables

if TYPE_CHECKING:
    from lwm_torch_ring.train.trainer import TorchTrainer


class TorchGenerator:
    """Generation and scoring with a trainer's parameters and RoPE, as they are when it is called."""

    def __init__(self, trainer: TorchTrainer) -> None:
        self._trainer = trainer

    # -- writing -------------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingSpec) -> list[list[int]]:
        """New tokens for each prompt; see ``lwm_core.protocols.Generator``."""
        found: list[list[int]] = [[] for _ in prompts]
        if not prompts or sampling.max_new_tokens < 1:
            return found
        vocabulary = self._trainer.context.model.vocabulary
        check_ids(prompts, vocabulary)
        draw = Draw(sampling, sampling.drawn_ids(vocabulary), len(prompts))
        rows, coming, done = Prompts(self._trainer, len(prompts)), prompts, [False] * len(prompts)
        with self._trainer.gathering():
            for _ in range(sampling.max_new_tokens):
                rows.read(coming)
                tokens = rows.draw(draw)
                for b, token in enumerate(tokens):
                    done[b] = done[b] or token in sampling.stop_ids
                    if not done[b]:
                        found[b].append(token)
                if all(done):
                    break
                coming = [[token] for token in tokens]
        return found

    def stream(self, prompt: Sequence[int], sampling: SamplingSpec) -> Iterator[int]:
        """New tokens of one prompt, as they come."""
        if sampling.max_new_tokens < 1:
            return
        with self._trainer.gathering():
            session = self.session()
            session.read(prompt)
            yield from session.stream(sampling)

    def session(self, *, guided: bool = False) -> TorchSession:
        """A conversation whose cache is kept; ``guided``: with an unconditional row beside it."""
        return TorchSession(self._trainer, guided)

    # -- scoring -------------------------------------------------------------------------------------------------

    def log_likelihood(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """``[N-1]``: natural-log probability of each token after the first, in the slice of its own modality.

        Nothing is cached: memory is that of one layer. Every data rank scores the same row.
        """
        ids = np.asarray(tokens, np.int32)
        check_ids([ids], self._trainer.context.model.vocabulary, at_least=2)
        t, how = self._trainer, how_to_read(self._trainer)
        slots = Slots(t, len(ids))
        padded, places = np.zeros((1, slots.count), np.int32), np.arange(slots.count, dtype=np.int32)[None]
        padded[0, : len(ids)] = ids
        segments, targets = slots.mine((places < len(ids)).astype(np.int32)), slots.mine(np.roll(padded, -1, axis=1))
        slices = list(t.context.model.vocabulary.slices.values())

        def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
            out: Tensor = slots.backend.attend(q, k, v, CAUSAL, segments)
            return out

        def tail(hidden: Tensor, head: Tensor) -> Tensor:
            return log_likelihoods(hidden, head, how.tp.mine(targets), slices, t.options.loss_chunk)

        rope = rope_tables(t.stage.rope, t.context.model.head_dim, slots.count, t.device)
        with reading(t), t.gathering(), blocks_given_back(t.device):
            of_ranks = every_rank(t.network(slots.mine(padded), slots.mine(places), rope, attend, how, tail))
        permuted = np.concatenate([of_ranks[rank][0] for rank in ranks_of_row(t, 0)])
        natural: NDArray[np.float32] = permuted[slots.inverse]
        return natural[: len(ids) - 1]
