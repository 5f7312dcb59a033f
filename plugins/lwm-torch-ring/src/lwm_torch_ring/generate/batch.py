"""Rows that are read and written on all ranks: chunks of tokens go in, tokens come out, and the cache stays between.

A chunk is dealt to the ranks of ``sp`` by the attention's layout; its tokens attend to each other there and to all that
is cached. Its own keys then join the cache of the rank that has them. Tokens that are written join the ranks in turn, a
page each.

Shapes: B rows of a data rank, S slots of a chunk, C = S / sp of a sequence shard, E hidden size, V ids of a modality.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import lcm
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from lwm_core.attention import AttentionMask
from lwm_core.protocols import AttentionAxes, SamplingSpec
from lwm_torch_ring.attention.accumulate import State, merge
from lwm_torch_ring.attention.peers import peers_on
from lwm_torch_ring.attention.strategies import make_kernel
from lwm_torch_ring.generate.cache import PAGE, LayerCache
from lwm_torch_ring.generate.decode import AttendOne, Decoding
from lwm_torch_ring.generate.reading import one_query, over_cache
from lwm_torch_ring.generate.sample import guide, sample
from lwm_torch_ring.model.llama import Compute
from lwm_torch_ring.model.rope import RopeTables, rope_tables

if TYPE_CHECKING:
    from lwm_torch_ring.train.trainer import TorchTrainer

CAUSAL = AttentionMask("causal")
TOKEN_CHUNK = 4096
"""Tokens of projections and feed-forward at a time, where the trainer's option says nothing."""

STEP = 64
"""Lengths of chunks are rounded up to multiples of this."""


def rounded(value: int, multiple: int) -> int:
    """``value``, rounded up."""
    return -(-value // multiple) * multiple


def how_to_read(trainer: TorchTrainer) -> Compute:
    """How the network runs where it has no gradients: in slices, so that memory is that of a layer's attention."""
    how = trainer.current.compute
    return replace(how, remat="none", token_chunk=how.token_chunk or TOKEN_CHUNK)


class Slots:
    """The slots of a chunk of some length, as this rank sees them.

    Args:
        trainer: whose mesh, attention and layout.
        longest: tokens of the longest row.
    """

    def __init__(self, trainer: TorchTrainer, longest: int) -> None:
        program = trainer.current
        ranks, tp = program.place.sizes["sp"], program.place.sizes["tp"]
        self.count = rounded(longest, lcm(STEP, 2 * ranks * tp))
        factory, options = trainer.context.attention, program.attention.options
        self.backend = factory.build(options, program.meshes.axes, AttentionAxes(), self.count)
        layout = factory.layout(options, self.count, ranks)
        self._order, self.inverse = layout.permutation(self.count), layout.inverse(self.count)
        self._place, self._device = program.place, program.device

    def ordered(self, array: NDArray[np.int32]) -> list[NDArray[np.int32]]:
        """The shards ``[B,C]`` of every rank of ``sp`` of ``[B,S]`` in natural order."""
        return np.split(array[:, self._order], self._place.sizes["sp"], axis=1)

    def mine(self, array: NDArray[np.int32]) -> Tensor:
        """This rank's shard."""
        return torch.tensor(self.ordered(array)[self._place.at["sp"]], device=self._device)


class Rows:
    """Rows on their way.

    Args:
        trainer: whose model, as it is now.
        count: rows of this data rank.
    """

    def __init__(self, trainer: TorchTrainer, count: int) -> None:
        self._trainer, self.count = trainer, count
        program = trainer.current
        self._how = how_to_read(trainer)
        self._peers = peers_on(program.meshes.axes, "sp")
        head_dim, dtype = trainer.context.model.head_dim, self._how.dtype
        self._kernel = make_kernel(program.attention.options, program.device, dtype, head_dim)
        self._layers = [LayerCache(trainer.options.cache) for _ in range(trainer.context.model.num_layers)]
        self._cached = [[0] * count for _ in range(self._peers.size)]
        self.lengths = [0] * count
        self._written = 0
        self._slots: dict[int, Slots] = {}
        self._tables: dict[int, RopeTables] = {}
        self._decoding: Decoding | None = None

    # -- reading -------------------------------------------------------------------------------------------------

    def read(self, rows: Sequence[Sequence[int]], longest: int | None = None) -> Tensor:
        """Read new tokens of every row, at least one each, in chunks; the logits after the last of each.

        Args:
            rows: this data rank's.
            longest: tokens of the longest row of all data ranks, which go through as many chunks together, for they
                share the parameters; of these rows if none.

        Returns:
            ``[B,V]`` float32, the same on all ranks that hold a row.
        """
        chunk = self._trainer.options.read_chunk
        logits: Tensor | None = None
        for start in range(0, longest or max(map(len, rows)), chunk):
            part = [list(row[start : start + chunk]) for row in rows]
            last = [start < len(row) <= start + chunk for row in rows]
            found = self._chunk(part, last)
            if logits is None:
                logits = found
            elif any(last):
                logits[last] = found[last]
        assert logits is not None
        return logits

    def _chunk(self, rows: Sequence[Sequence[int]], last: Sequence[bool]) -> Tensor:
        """Read a chunk; the logits ``[B,V]`` of the rows whose last token is in it. Of others they mean nothing."""
        slots = self._slots_for(max(1, max(map(len, rows))))
        tokens = np.zeros((self.count, slots.count), np.int32)
        index = np.full((self.count, slots.count), -1, np.int32)
        ending = np.zeros((self.count, slots.count), np.int32)
        for b, row in enumerate(rows):
            tokens[b, : len(row)] = row
            index[b, : len(row)] = self.lengths[b] + np.arange(len(row))
            ending[b, len(row) - 1] = last[b]
        here = index >= 0
        segments = slots.mine(here.astype(np.int32))
        of_ranks = [part.astype(bool) for part in slots.ordered(here.astype(np.int32))]
        chosen = [None if row.all() else torch.from_numpy(np.flatnonzero(row)) for row in of_ranks[self._peers.rank]]
        chosen = [None if which is None else which.to(segments.device) for which in chosen]
        before = [list(used) for used in self._cached]

        def attend(q: Tensor, k: Tensor, v: Tensor, number: int) -> Tensor:
            layer = self._layers[number]
            if not any(map(any, before)):
                out: Tensor = slots.backend.attend(q, k, v, CAUSAL, segments)
            else:
                total = over_cache(q, layer, before, self._peers, self._kernel)
                new, lse = slots.backend.forward(q, k, v, CAUSAL, segments)
                merge(State(total.out, total.lse), new, lse)
                out = total.out.to(q.dtype)
            layer.add(k, v, chosen)
            return out

        mine = self._how.tp.mine(slots.mine(ending)).bool()

        def tail(hidden: Tensor, head: Tensor) -> Tensor:
            if not any(last):
                return hidden.new_zeros(self.count, len(head), dtype=torch.float32)
            ends = self._of_row(torch.where(mine[..., None], hidden.float(), 0.0).sum(dim=1))
            return _logits(ends.to(hidden.dtype), head)

        positions = slots.mine(np.maximum(index, 0))
        logits: Tensor = self._trainer.network(
            slots.mine(tokens), positions, self._rope(max(self.lengths) + slots.count), attend, self._how, tail
        )
        for used, part in zip(self._cached, of_ranks, strict=True):
            used[:] = [have + int(row.sum()) for have, row in zip(used, part, strict=True)]
        self.lengths = [have + len(row) for have, row in zip(self.lengths, rows, strict=True)]
        return logits

    def _slots_for(self, longest: int) -> Slots:
        made = Slots(self._trainer, longest) if longest not in self._slots else self._slots[longest]
        self._slots = {longest: made}
        return made

    def _rope(self, positions: int) -> RopeTables:
        t, size = self._trainer, rounded(positions, 4096)
        if size not in self._tables:
            self._tables = {size: rope_tables(t.stage.rope, t.context.model.head_dim, size, t.device)}
        return self._tables[size]

    def keep(self, rows: slice) -> None:
        """Drop all rows but these."""
        for layer in self._layers:
            layer.k.keep(rows)
            layer.v.keep(rows)
        self._cached = [used[rows] for used in self._cached]
        self.lengths = self.lengths[rows]
        self.count = len(self.lengths)

    # -- writing -------------------------------------------------------------------------------------------------

    def write(self, tokens: Sequence[int]) -> Tensor:
        """Read one token a row; the logits ``[B,V]`` after it. No ring runs."""
        owner = self._written // PAGE % self._peers.size
        self._written += 1
        device = self._trainer.device
        here = owner == self._peers.rank

        def attend(q: Tensor, k: Tensor, v: Tensor, number: int) -> Tensor:
            self._layers[number].append(k, v, here)
            return one_query(q, self._layers[number], self._peers)

        given, positions = torch.tensor(tokens, device=device), torch.tensor(self.lengths, device=device)
        rope = self._rope(max(self.lengths) + 1)
        if self._decoding is None and self._trainer.gathering.together():
            self._decoding = Decoding(self._trainer.network, self._how, lent=self._trainer.gathering.lends)
        if self._decoding is not None:
            logits = self._decoding.logits(given, positions, rope, attend)
        else:
            logits = self._through_modules(given, positions, rope, attend)
        self._cached[owner] = [used + 1 for used in self._cached[owner]]
        self.lengths = [have + 1 for have in self.lengths]
        return logits

    def _through_modules(self, tokens: Tensor, positions: Tensor, rope: RopeTables, attend: AttendOne) -> Tensor:
        """What ``Decoding.logits`` gives, by the network, which gathers parameters a layer at a time."""

        def of_one(q: Tensor, k: Tensor, v: Tensor, number: int) -> Tensor:
            return attend(q[:, 0], k[:, 0], v[:, 0], number)[:, None]

        def tail(hidden: Tensor, head: Tensor) -> Tensor:
            return _logits(hidden[:, 0], head)

        how = replace(self._how, tp=self._how.tp.whole)
        logits: Tensor = self._trainer.network(tokens[:, None], positions[:, None], rope, of_one, how, tail)
        return logits

    def _of_row(self, ends: Tensor) -> Tensor:
        """The sum over the ranks that hold a row's tokens; all but one of them have zeros."""
        program = self._trainer.current
        for axis in ("tp", "sp"):
            if program.meshes.axes is not None and program.place.sizes[axis] > 1:
                dist.all_reduce(ends, group=program.meshes.axes.get_group(axis))
        return ends


def _logits(stream: Tensor, head: Tensor) -> Tensor:
    return torch.nn.functional.linear(stream, head.to(stream.dtype)).float()


class Draw:
    """Draws tokens of all prompts of a call, the same on any mesh.

    Args:
        sampling: how.
        ids: those that are drawn from.
        prompts: of all data ranks.
        guided: rows are pairs, a conditional one and its unconditional one, for which one token is drawn.
    """

    def __init__(self, sampling: SamplingSpec, ids: slice, prompts: int, guided: bool = False) -> None:
        self._sampling, self._ids, self._prompts, self._guided = sampling, ids, prompts, guided
        self._random = torch.Generator().manual_seed(sampling.seed)

    def tokens(self, logits: Tensor, first: int) -> Tensor:
        """``[B]`` ids for ``logits [B,V]``, whose first row is row ``first`` of the call; of pairs one id each."""
        if self._guided:
            logits, first = guide(logits, self._sampling.guidance), first // 2
        if self._sampling.temperature == 0.0:
            return sample(logits[:, self._ids], logits[:, 0], self._sampling) + self._ids.start
        uniform = torch.rand(self._prompts, generator=self._random)
        rows = torch.arange(first, first + len(logits)).clamp(max=self._prompts - 1)
        return sample(logits[:, self._ids], uniform[rows].to(logits.device), self._sampling) + self._ids.start


def every_rank(mine: Tensor) -> NDArray[Any]:
    """``[world, ...]`` of what every rank has."""
    here = mine.detach().cpu().contiguous()
    if not dist.is_initialized():
        return here[None].numpy()
    everyone = [torch.empty_like(here) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, here)
    return torch.stack(everyone).numpy()
