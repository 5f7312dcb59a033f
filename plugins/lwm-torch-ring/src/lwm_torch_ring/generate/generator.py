"""Token-in, token-out generation and scoring, natural order at the border; every rank calls it at the same time.

Rows are dealt to the data ranks, a row's tokens to the ranks of ``sp``.

Shapes: B rows of a data rank, S slots of a row, C = S / sp of a sequence shard, E hidden size, V ids of the modality.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lwm_core.errors import ShapeError
from lwm_core.mesh import data_ranks
from lwm_core.protocols import SamplingSpec
from lwm_torch_ring.generate.batch import CAUSAL, Draw, Rows, Slots, every_rank, reading, rounded
from lwm_torch_ring.model.loss import log_likelihoods
from lwm_torch_ring.model.rope import rope_tables
from lwm_torch_ring.train.heartbeat import naming_the_lost

if TYPE_CHECKING:
    from lwm_torch_ring.train.trainer import TorchTrainer


class TorchGenerator:
    """Generation and scoring with a trainer's parameters and RoPE, as they are when it is called."""

    def __init__(self, trainer: TorchTrainer) -> None:
        self._trainer = trainer

    # -- writing -------------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingSpec) -> list[list[int]]:
        """New tokens for each prompt; see ``lwm_core.protocols.Generator``."""
        rows: list[list[int]] = [[] for _ in prompts]
        done = [False] * len(prompts)
        for tokens in self._tokens(prompts, sampling):
            for b, token in enumerate(tokens):
                done[b] = done[b] or token in sampling.stop_ids
                if not done[b]:
                    rows[b].append(token)
            if all(done):
                break
        return rows

    def stream(self, prompt: Sequence[int], sampling: SamplingSpec) -> Iterator[int]:
        """New tokens of one prompt, as they come."""
        for (token,) in self._tokens([prompt], sampling):
            if token in sampling.stop_ids:
                return
            yield token

    def _tokens(self, prompts: Sequence[Sequence[int]], sampling: SamplingSpec) -> Iterator[list[int]]:
        """One token a prompt at a time, at most ``max_new_tokens`` times; stop ids are the caller's affair."""
        if not prompts or sampling.max_new_tokens < 1:
            return
        self._check(prompts)
        ids = self._modality(sampling)
        data, world = self._trainer.current.place.data_rank
        count = rounded(len(prompts), world) // world
        padded = [*prompts, *[prompts[-1]] * (count * world - len(prompts))]
        first = data * count
        rows, draw = Rows(self._trainer, count), Draw(sampling, ids, len(prompts))
        mine, longest = padded[first : first + count], max(map(len, prompts))
        with self._trainer.gathering():
            with self._reading():
                token = self._agreed(draw.tokens(rows.read(mine, longest), first))
            for step in range(sampling.max_new_tokens):
                yield token[: len(prompts)]
                if step + 1 < sampling.max_new_tokens:
                    with self._reading():
                        token = self._agreed(draw.tokens(rows.write(token[first : first + count]), first))

    # -- scoring -------------------------------------------------------------------------------------------------

    def log_likelihood(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """``[N-1]``: natural-log probability of each token after the first, in the slice of its own modality.

        Nothing is cached: memory is that of one layer. Every data rank scores the same row.
        """
        ids = np.asarray(tokens, np.int32)
        self._check([ids], at_least=2)
        t, how = self._trainer, reading(self._trainer)
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
        with self._trainer.gathering(), self._reading():
            of_ranks = every_rank(t.network(slots.mine(padded), slots.mine(places), rope, attend, how, tail))
        permuted = np.concatenate([of_ranks[rank][0] for rank in self._ranks_of_row(0)])
        natural: NDArray[np.float32] = permuted[slots.inverse]
        return natural[: len(ids) - 1]

    # -- what both need ------------------------------------------------------------------------------------------

    def _check(self, prompts: Sequence[Any], at_least: int = 1) -> None:
        size = self._trainer.context.model.vocabulary.size
        for number, prompt in enumerate(prompts):
            if len(prompt) < at_least:
                raise ShapeError(f"generate: prompt {number} has {len(prompt)} tokens; expected at least {at_least}")
            if min(prompt) < 0 or max(prompt) >= size:
                raise ShapeError(f"generate: prompt {number} holds ids outside [0, {size})")

    def _modality(self, sampling: SamplingSpec) -> slice:
        slices = self._trainer.context.model.vocabulary.slices
        if sampling.modality not in slices:
            raise ShapeError(f"generate: modality {sampling.modality!r} is not in this model's vocabulary")
        return slices[sampling.modality]

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Around every call of the model, and no ``yield``: the caller's gradients are the caller's affair."""
        with naming_the_lost(self._trainer.heart), torch.no_grad():
            yield

    def _ranks_of_row(self, data_rank: int) -> list[int]:
        """The ranks that hold a data rank's tokens, in their order: by ``sp``, and by ``tp`` within."""
        sizes = self._trainer.current.place.sizes
        tp, sp = sizes["tp"], sizes["sp"]
        first = data_rank * tp * sp
        return list(range(first, first + sp * tp))

    def _agreed(self, mine: Tensor) -> list[int]:
        """The tokens of all rows, as the first rank of each data rank drew them."""
        of_ranks = every_rank(mine)
        firsts = [self._ranks_of_row(data)[0] for data in range(data_ranks(self._trainer.current.place.sizes))]
        return [int(token) for rank in firsts for token in of_ranks[rank]]
