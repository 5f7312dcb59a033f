"""Token-in, token-out generation and scoring, natural order at the border; every rank calls it at the same time.

Prompts of a batch are padded to one length that the layout divides; padding is segment 0. Rows are dealt to the data
ranks, a row's slots to the ranks of ``sp``.

Shapes: B rows of a data rank, P prompt slots, C = P / sp of a sequence shard, E hidden size, V ids of the modality.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import lcm
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from lwm_core.attention import AttentionMask
from lwm_core.errors import ShapeError
from lwm_core.mesh import data_ranks
from lwm_core.protocols import AttentionAxes, SamplingSpec
from lwm_torch_ring.attention.peers import Peers, peers_on
from lwm_torch_ring.generate.cache import LayerCache, attend_cached
from lwm_torch_ring.generate.sample import sample
from lwm_torch_ring.model.llama import Attend, Compute
from lwm_torch_ring.model.loss import log_likelihoods
from lwm_torch_ring.model.rope import RopeTables, rope_tables
from lwm_torch_ring.model.sharding import gathered
from lwm_torch_ring.train.heartbeat import naming_the_lost

if TYPE_CHECKING:
    from lwm_torch_ring.train.trainer import TorchTrainer

PROMPT_STEP = 64
"""Prompt lengths are rounded up to multiples of this."""

CAUSAL = AttentionMask("causal")


def _rounded(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class _Row:
    """The slots of prompts of one length, as this rank sees them."""

    def __init__(self, trainer: TorchTrainer, longest: int) -> None:
        program = trainer.current
        ranks, tp = program.place.sizes["sp"], program.place.sizes["tp"]
        self.slots = _rounded(longest, lcm(PROMPT_STEP, 2 * ranks * tp))
        factory, options = trainer.context.attention, program.attention.options
        self.backend = factory.build(options, program.meshes.axes, AttentionAxes(), self.slots)
        self._order = factory.layout(options, self.slots, ranks).permutation(self.slots)
        self.inverse = factory.layout(options, self.slots, ranks).inverse(self.slots)
        self._place, self._device = program.place, program.device

    def mine(self, array: NDArray[np.int32]) -> Tensor:
        """This rank's shard ``[B,C]`` of ``[B,P]`` in natural order."""
        part = self._place.tokens(array[:, self._order])
        return torch.tensor(part, device=self._device)


class TorchGenerator:
    """Generation and scoring with a trainer's parameters and RoPE, as they are when it is called."""

    def __init__(self, trainer: TorchTrainer) -> None:
        self._trainer = trainer

    # -- the public face -----------------------------------------------------------------------------------------

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

    def log_likelihood(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """``[N-1]``: natural-log probability of each token after the first, in the slice of its own modality."""
        ids = np.asarray(tokens, np.int32)
        self._check([ids], at_least=2)
        t = self._trainer
        with self._at_hand():
            row = _Row(t, len(ids))
            padded = np.zeros((1, row.slots), np.int32)  # every data rank scores the same row
            padded[0, : len(ids)] = ids
            places = np.arange(row.slots, dtype=np.int32)[None]
            segments = row.mine((places < len(ids)).astype(np.int32))
            targets, how = row.mine(np.roll(padded, -1, axis=1)), self._compute()
            slices = list(t.context.model.vocabulary.slices.values())

            def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
                out: Tensor = row.backend.attend(q, k, v, CAUSAL, segments)
                return out

            def tail(hidden: Tensor, head: Tensor) -> Tensor:
                return log_likelihoods(hidden, head, how.tp.mine(targets), slices, t.options.loss_chunk)

            scores = self._run(row.mine(padded), row.mine(places), self._rope(row.slots), attend, how, tail)
        of_ranks = self._from_all(scores)
        permuted = np.concatenate([of_ranks[rank][0] for rank in self._ranks_of_row(0)])
        natural: NDArray[np.float32] = permuted[row.inverse]
        return natural[: len(ids) - 1]

    # -- host side -----------------------------------------------------------------------------------------------

    def _check(self, prompts: Sequence[Any], at_least: int = 1) -> None:
        size = self._trainer.context.model.vocabulary.size
        for number, prompt in enumerate(prompts):
            if len(prompt) < at_least:
                raise ShapeError(f"generate: prompt {number} has {len(prompt)} tokens; expected at least {at_least}")
            if min(prompt) < 0 or max(prompt) >= size:
                raise ShapeError(f"generate: prompt {number} holds ids outside [0, {size})")

    @contextmanager
    def _at_hand(self) -> Iterator[None]:
        """No gradients, and the parameters brought together where they have room."""
        heart = self._trainer.heart
        with naming_the_lost(heart), torch.no_grad(), gathered(self._trainer.network, self._compute().dtype):
            yield

    def _compute(self) -> Compute:
        return replace(self._trainer.current.compute, remat="none")

    def _rope(self, positions: int) -> RopeTables:
        t = self._trainer
        return rope_tables(t.stage.rope, t.context.model.head_dim, positions, t.device)

    def _run(
        self, tokens: Tensor, positions: Tensor, rope: RopeTables, attend: Attend, how: Compute, tail: Any
    ) -> Tensor:
        result: Tensor = self._trainer.network(tokens, positions, rope, attend, how, tail)
        return result

    def _from_all(self, mine: Tensor) -> NDArray[Any]:
        """``[world, ...]`` of what every rank has."""
        here = mine.detach().cpu().contiguous()
        if not dist.is_initialized():
            return here[None].numpy()
        everyone = [torch.empty_like(here) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, here)
        return torch.stack(everyone).numpy()

    def _ranks_of_row(self, data_rank: int) -> list[int]:
        """The ranks that hold a data rank's tokens, in their order: by ``sp``, and by ``tp`` within."""
        sizes = self._trainer.current.place.sizes
        tp, sp = sizes["tp"], sizes["sp"]
        first = data_rank * tp * sp
        return [first + t * sp + s for s in range(sp) for t in range(tp)]

    def _tokens(self, prompts: Sequence[Sequence[int]], sampling: SamplingSpec) -> Iterator[list[int]]:
        """One token a prompt at a time, at most ``max_new_tokens`` times; stop ids are the caller's affair."""
        if not prompts or sampling.max_new_tokens < 1:
            return
        self._check(prompts)
        if sampling.modality not in self._trainer.context.model.vocabulary.slices:
            raise ShapeError(f"generate: modality {sampling.modality!r} is not in this model's vocabulary")
        with self._at_hand():
            batch = _Batch(self, prompts, sampling)
            token = batch.prefill()
            for step in range(sampling.max_new_tokens):
                yield [int(x) for x in token[: len(prompts)]]
                if step + 1 < sampling.max_new_tokens:
                    token = batch.decode(token, step)


class _Batch:
    """Prompts on their way: this rank's rows and slots, and the cache that they leave."""

    def __init__(self, generator: TorchGenerator, prompts: Sequence[Sequence[int]], sampling: SamplingSpec) -> None:
        t = generator._trainer
        self._generator, self._sampling = generator, sampling
        self._place = t.current.place
        self._data, world = self._place.data_rank
        self._ranks = data_ranks(self._place.sizes)
        rows = _rounded(len(prompts), world)
        padded = [list(prompt) for prompt in prompts] + [list(prompts[-1])] * (rows - len(prompts))
        mine = padded[self._data * rows // world : (self._data + 1) * rows // world]
        self._row = _Row(t, max(map(len, prompts)))
        tokens = np.zeros((len(mine), self._row.slots), np.int32)
        index = np.full((len(mine), self._row.slots), -1, np.int32)
        for b, prompt in enumerate(mine):
            tokens[b, : len(prompt)] = prompt
            index[b, : len(prompt)] = np.arange(len(prompt))
        self._tokens, self._index = self._row.mine(tokens), self._row.mine(index)
        self._lengths = torch.tensor([len(prompt) for prompt in mine], device=t.device)
        self._rope = generator._rope(self._row.slots + sampling.max_new_tokens)
        self._layers: list[LayerCache] = []
        self._how = generator._compute()
        self._peers: Peers = peers_on(t.current.meshes.axes, "sp")
        self._prompts = len(prompts)
        self._draws = torch.Generator().manual_seed(sampling.seed)
        self._ids = t.context.model.vocabulary.slices[sampling.modality]

    def prefill(self) -> list[int]:
        """The first new token of every row of every data rank; fills the cache."""
        segments = (self._index >= 0).int()
        last = self._how.tp.mine(self._index == (self._lengths - 1)[:, None])

        def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
            self._layers.append(LayerCache.after_prefill(k, v, self._sampling.max_new_tokens))
            out: Tensor = self._row.backend.attend(q, k, v, CAUSAL, segments)
            return out

        def tail(hidden: Tensor, head: Tensor) -> Tensor:
            ends = torch.where(last[..., None], hidden.float(), 0.0).sum(dim=1)
            return self._drawn(self._of_row(ends).to(hidden.dtype), head)

        positions = self._index.clamp(min=0)
        return self._agreed(self._generator._run(self._tokens, positions, self._rope, attend, self._how, tail))

    def decode(self, token: Sequence[int], step: int) -> list[int]:
        """The tokens after ``token``, which is new token number ``step``."""
        local = len(self._lengths)
        given = torch.tensor(token[self._data * local : (self._data + 1) * local], device=self._lengths.device)

        def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
            self._layers[layer].add(k, v, step)
            return attend_cached(q, self._layers[layer], self._index, step, self._peers)

        def tail(hidden: Tensor, head: Tensor) -> Tensor:
            return self._drawn(hidden[:, 0], head)

        how = replace(self._how, tp=self._how.tp.whole)
        positions = (self._lengths + step)[:, None]
        return self._agreed(self._generator._run(given[:, None], positions, self._rope, attend, how, tail))

    def _of_row(self, ends: Tensor) -> Tensor:
        """The sum over the ranks that hold a row's tokens; all but one of them have zeros."""
        axes = self._generator._trainer.current.meshes.axes
        for axis in ("tp", "sp"):
            if axes is not None and self._place.sizes[axis] > 1:
                dist.all_reduce(ends, group=axes.get_group(axis))
        return ends

    def _drawn(self, hidden: Tensor, head: Tensor) -> Tensor:
        """A token a row of this data rank, ``[B]``, from ``hidden [B,E]``."""
        logits = torch.nn.functional.linear(hidden, head[self._ids].to(hidden.dtype)).float()
        uniform = torch.rand(self._prompts, generator=self._draws)  # the same for a prompt on any mesh
        first = self._data * len(self._lengths)
        rows = torch.arange(first, first + len(self._lengths)).clamp(max=self._prompts - 1)
        return sample(logits, uniform[rows].to(logits.device), self._sampling) + self._ids.start

    def _agreed(self, mine: Tensor) -> list[int]:
        """The tokens of all rows, as the first rank of each data rank drew them."""
        of_ranks = self._generator._from_all(mine)
        firsts = [self._generator._ranks_of_row(data)[0] for data in range(self._ranks)]
        return [int(token) for rank in firsts for token in of_ranks[rank]]
