"""Rows on their way: chunks of tokens go in, tokens come out, and the cache stays between.

Long chunks are dealt to the ranks of ``sp`` by the attention's layout. A few tokens are the same on all ranks. Lengths
are rounded up to a few sizes, for which programs are compiled.

Shapes: B rows, S slots of a chunk, c few tokens, E hidden size; n ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import lcm
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from lwm_core.errors import LwmError
from lwm_core.protocols import SamplingSpec
from lwm_jax_ring.generate.cache import PAGE, Cache
from lwm_jax_ring.generate.programs import Programs
from lwm_jax_ring.generate.reading import few_sizes, room, rounded
from lwm_jax_ring.generate.weights import serving_weights
from lwm_jax_ring.model.rope import RopeTables, rope_tables
from lwm_jax_ring.model.sharding import ROWS, place
from lwm_jax_ring.train.heartbeat import naming_the_lost

if TYPE_CHECKING:
    from lwm_jax_ring.train.trainer import JaxTrainer

STEP = 64
"""Lengths of chunks are rounded up to multiples of this."""

FEW = (1, 16, PAGE)
"""Numbers of tokens that are read into the tail at once."""

POSITIONS = 8192
"""RoPE tables are made for so many positions at least, and for twice as many whenever they are too short."""


class Rows:
    """Of all data ranks.

    Args:
        trainer: whose model, as it is now.
        programs: of its mesh.
        count: rows; the data ranks divide it.
        guided: they are pairs, a conditional one and its unconditional one, which go on with the same tokens. Each
            data rank holds whole pairs.
    """

    def __init__(self, trainer: JaxTrainer, programs: Programs, count: int, guided: bool = False) -> None:
        self.count, self.lengths, self._guided = count, [0] * count, guided
        self._trainer, self._programs = trainer, programs
        self._rope, self._positions = trainer.stage.rope, 0
        self._tables: RopeTables
        self._fill, self._tail, self._room = [0] * programs.ranks, 0, 0
        self._cache: Cache | None = None
        self._whole = True
        self._layout_of = trainer.context.attention.layout
        self._attention = trainer.current.attention.options
        dtype, model = jnp.dtype(trainer.options.compute_dtype), trainer.context.model
        with naming_the_lost(trainer.heart):
            self._weights = serving_weights(trainer.parameters, trainer.current.shardings, model.vocabulary, dtype)
            self._ends = place(np.zeros((count, model.hidden_size), dtype), programs.sharding(P(ROWS, None)))

    @contextmanager
    def _working(self) -> Iterator[None]:
        if not self._whole:
            raise LwmError("generate: these rows were interrupted in the middle of a step; begin them anew")
        self._whole = False
        with naming_the_lost(self._trainer.heart):
            yield
        self._whole = True

    # -- reading -------------------------------------------------------------------------------------------------

    def read(self, rows: Sequence[Sequence[int]], expected: int = 0) -> None:
        """Read new tokens of every row, at least one each, in chunks; ``expected`` more will be written soon."""
        chunk, longest = self._trainer.options.read_chunk, max(map(len, rows))
        starts = range(0, longest, chunk)
        coming = [min(chunk, longest - start) for start in starts]
        with self._working():
            self._reserve(sum(self._slots(length) for length in coming if length > PAGE), expected)
            for start, length in zip(starts, coming, strict=True):
                part = [list(row[start : start + chunk]) for row in rows]
                last = [start < len(row) <= start + chunk for row in rows]
                (self._read_few if length <= PAGE else self._read_chunk)(part, last)
                self.lengths = [have + len(row) for have, row in zip(self.lengths, part, strict=True)]

    def _slots(self, length: int) -> int:
        ranks = self._programs.ranks
        return few_sizes(length, ranks * PAGE if self._programs.kind == "int8" else lcm(STEP, 2 * ranks))

    def _arrays(self, rows: Sequence[Sequence[int]], last: Sequence[bool], slots: int) -> tuple[np.ndarray, ...]:
        """tokens, positions, which slots are tokens, and which is a row's last; each ``[B,slots]`` int32."""
        tokens, positions, held, ending = np.zeros((4, self.count, slots), np.int32)
        for b, row in enumerate(rows):
            tokens[b, : len(row)] = row
            positions[b] = self.lengths[b] + np.arange(slots)
            held[b, : len(row)] = 1
            ending[b, len(row) - 1] = last[b]
        return tokens, positions, held, ending

    def _read_chunk(self, rows: Sequence[Sequence[int]], last: Sequence[bool]) -> None:
        if self._tail:
            self._flush()
        programs, weights = self._programs, self._weights
        slots, fresh = self._slots(max(map(len, rows))), not any(self.lengths)
        order = self._layout_of(self._attention, slots, programs.ranks).permutation(slots)
        sharding = programs.sharding(P(ROWS, "sp"))
        tokens, positions, new, ending = (place(array[:, order], sharding) for array in self._arrays(rows, last, slots))
        cache, fill = self._taken(), self._filled()
        x, cos, sin = programs.begin(weights.embed_tokens, self._rope_for(slots), tokens, positions)
        layers, through = [], programs.layer(slots, fresh)
        for parameters, layer in zip(weights.layers, cache.layers, strict=True):
            x, kept = through(parameters, layer, x, cos, sin, cache.held, new, fill)
            layers.append(kept)
        self._ends, held = programs.end(weights.norm, self._ends, x, ending, cache.held, new, fill)
        self._cache = Cache(tuple(layers), held, cache.tail_held)
        self._fill = [slot + slots // programs.ranks for slot in self._fill]

    def _read_few(self, rows: Sequence[Sequence[int]], last: Sequence[bool]) -> None:
        longest = max(map(len, rows))
        size = next(size for size in FEW if size >= longest)
        if self._tail + size > PAGE:
            self._flush()
        tokens, positions, new, ending = self._arrays(rows, last, size)
        self._ends, self._cache = self._programs.few(
            self._weights, self._taken(), self._rope_for(size), tokens, positions, new, ending, self._ends,
            np.int32(self._tail), self._filled(),
        )  # fmt: skip
        self._tail += longest

    def unguide(self) -> None:
        """Of pairs, keep the conditional rows alone."""
        if not self._guided:
            return
        with self._working():
            cache, self._cache = self._cache, None
            self._cache, self._ends = self._programs.conditional(cache, self._ends)
            self.count, self.lengths, self._guided = self.count // 2, self.lengths[0::2], False

    # -- writing -------------------------------------------------------------------------------------------------

    def write(self, sampling: SamplingSpec) -> Iterator[list[int]]:
        """One token a row at a time, at most ``max_new_tokens`` times; the last that was given is not cached yet."""
        draw, step = self._programs.draws(sampling, self._guided)
        key = jax.random.key(sampling.seed)
        with self._working():
            self._reserve(0, sampling.max_new_tokens)
            token = draw(self._weights.heads[sampling.modality], self._ends, key, np.int32(0))
            found = np.asarray(token).tolist()
        for number in range(1, sampling.max_new_tokens):
            yield found
            with self._working():
                if self._tail == PAGE:
                    self._flush()
                token, self._ends, self._cache = step(
                    self._weights, self._taken(), self._rope_for(1), token, np.array(self.lengths, np.int32),
                    np.int32(self._tail), self._filled(), key, np.int32(number),
                )  # fmt: skip
                self._tail += 1
                self.lengths = [have + 1 for have in self.lengths]
                found = np.asarray(token).tolist()
        yield found

    # -- room ----------------------------------------------------------------------------------------------------

    def _taken(self) -> Cache:
        """The cache, to be given away."""
        cache, self._cache = self._cache, None
        assert cache is not None
        return cache

    def _filled(self) -> np.ndarray:
        return np.array(self._fill, np.int32)

    def _reserve(self, slots: int, written: int) -> None:
        """Room for so many more slots of chunks, which all ranks share, for tokens that come a few at a time, and for
        two pages, of a tail that is not full and of the next."""
        ranks = self._programs.ranks
        needed = max(self._fill) + slots // ranks + (rounded(written, PAGE * ranks) // ranks) + 2 * PAGE
        if self._cache is None:
            self._room = room(needed)
            self._cache = self._programs.empty(self.count, self._room)
        elif needed > self._room:
            self._room = room(needed)
            self._cache = self._programs.grow(self._taken(), self._room)

    def _flush(self) -> None:
        """The tail becomes a page of the rank that has the fewest slots."""
        self._reserve(0, 0)
        turn = int(np.argmin(self._fill))
        self._cache = self._programs.flush(self._taken(), self._filled(), np.int32(turn))
        self._fill[turn] += PAGE
        self._tail = 0

    def _rope_for(self, coming: int) -> RopeTables:
        """Tables that reach beyond ``coming`` tokens more."""
        needed = max(self.lengths) + coming
        if needed > self._positions:
            self._positions = max(POSITIONS, 1 << (needed - 1).bit_length())
            tables = rope_tables(self._rope, self._programs.model.head_dim, self._positions)
            self._tables = jax.tree.map(lambda table: place(table, self._programs.sharding(P())), tables)
        return self._tables
