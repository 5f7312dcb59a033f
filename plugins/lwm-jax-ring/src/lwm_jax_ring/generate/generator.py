"""Token-in, token-out generation and scoring, natural order at the border.

Prompts of a batch are padded to one length that the layout divides; padding is segment 0. Lengths are rounded up to a
few sizes so that programs are compiled for those only.

Shapes: B rows, P prompt slots, N new tokens, L layers, E hidden size, V ids of the modality.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from math import lcm
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray

from lwm_core.attention import AttentionMask
from lwm_core.errors import ShapeError
from lwm_core.mesh import data_ranks
from lwm_core.protocols import AttentionAxes, SamplingSpec
from lwm_jax_ring.generate.cache import Cache, attend_cached
from lwm_jax_ring.generate.sample import sample
from lwm_jax_ring.model.llama import Compute
from lwm_jax_ring.model.rope import RopeTables, rope_tables
from lwm_jax_ring.model.sharding import ROWS, place, stream_sharding
from lwm_jax_ring.train.heartbeat import naming_the_lost

if TYPE_CHECKING:
    from lwm_jax_ring.train.trainer import JaxTrainer

PROMPT_STEP, NEW_STEP = 64, 32
"""Prompt and new lengths are rounded up to multiples of these."""


def _rounded(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class JaxGenerator:
    """Generation and scoring with a trainer's parameters and RoPE, as they are when it is called."""

    def __init__(self, trainer: JaxTrainer) -> None:
        self._trainer = trainer
        self._programs: dict[Any, Any] = {}

    # -- the public face -----------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingSpec) -> list[list[int]]:
        """New tokens for each prompt; see ``lwm_core.protocols.Generator``."""
        rows: list[list[int]] = [[] for _ in prompts]
        done = [False] * len(prompts)
        for tokens in self._drawn(prompts, sampling):
            for b, token in enumerate(tokens):
                done[b] = done[b] or token in sampling.stop_ids
                if not done[b]:
                    rows[b].append(token)
            if all(done):
                break
        return rows

    def stream(self, prompt: Sequence[int], sampling: SamplingSpec) -> Iterator[int]:
        """New tokens of one prompt, as they come."""
        for (token,) in self._drawn([prompt], sampling):
            if token in sampling.stop_ids:
                return
            yield token

    def log_likelihood(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """``[N-1]``: natural-log probability of each token after the first, in the slice of its own modality."""
        ids = np.asarray(tokens, np.int32)
        self._check([ids], at_least=2)
        slots, order = self._slots(len(ids))
        backend = self._backend(slots)
        rows = data_ranks(dict(self._trainer.mesh.shape))  # one for each data rank, all the same
        row = np.zeros((rows, slots), np.int32)
        row[:, : len(ids)] = ids
        targets = np.roll(row, -1, axis=1)
        positions = np.tile(np.arange(slots, dtype=np.int32), (rows, 1))
        segments = (positions < len(ids)).astype(np.int32)
        key = ("score", slots)
        if key not in self._programs:
            self._programs[key] = jax.jit(partial(self._score, backend), out_shardings=self._everywhere())
        placed = [self._put(x[:, order], P(ROWS, "sp")) for x in (row, targets, segments, positions)]
        with naming_the_lost(self._trainer.heart):
            scores = np.asarray(self._programs[key](self._trainer.parameters, self._rope(slots), *placed))
        natural = scores[:, backend.layout.inverse(slots)]
        return natural[0, : len(ids) - 1]

    def _drawn(self, prompts: Sequence[Sequence[int]], sampling: SamplingSpec) -> Iterator[list[int]]:
        with naming_the_lost(self._trainer.heart):
            yield from self._tokens(prompts, sampling)

    # -- host side -----------------------------------------------------------------------------------------------

    def _check(self, prompts: Sequence[Any], at_least: int = 1) -> None:
        size = self._trainer.context.model.vocabulary.size
        for number, prompt in enumerate(prompts):
            if len(prompt) < at_least:
                raise ShapeError(f"generate: prompt {number} has {len(prompt)} tokens; expected at least {at_least}")
            if min(prompt) < 0 or max(prompt) >= size:
                raise ShapeError(f"generate: prompt {number} holds ids outside [0, {size})")

    def _put(self, array: Any, spec: P) -> jax.Array:
        return place(array, NamedSharding(self._trainer.mesh, spec))

    def _everywhere(self) -> NamedSharding | None:
        """Where results lie that every process reads; one process reads them from wherever they are."""
        return NamedSharding(self._trainer.mesh, P()) if self._trainer.processes.world > 1 else None

    def _backend(self, slots: int) -> Any:
        t = self._trainer
        return t.context.attention.build(t.current.attention.options, t.mesh, AttentionAxes(), slots)

    def _rope(self, positions: int) -> RopeTables:
        t = self._trainer
        return rope_tables(t.stage.rope, t.context.model.head_dim, positions)

    def _slots(self, longest: int) -> tuple[int, NDArray[np.int32]]:
        """Padded length, and the layout's permutation of it."""
        t = self._trainer
        ranks = t.mesh.shape["sp"]
        slots = _rounded(longest, lcm(PROMPT_STEP, 2 * ranks))
        layout = t.context.attention.layout(t.current.attention.options, slots, ranks)
        return slots, layout.permutation(slots)

    def _tokens(self, prompts: Sequence[Sequence[int]], sampling: SamplingSpec) -> Iterator[list[int]]:
        """One token a prompt at a time, at most ``max_new_tokens`` times; stop ids are the caller's affair."""
        if not prompts or sampling.max_new_tokens < 1:
            return
        self._check(prompts)
        t = self._trainer
        rows = _rounded(len(prompts), data_ranks(dict(t.mesh.shape)))
        slots, order = self._slots(max(map(len, prompts)))
        padded = [list(prompt) for prompt in prompts] + [list(prompts[-1])] * (rows - len(prompts))
        tokens, index = np.zeros((rows, slots), np.int32), np.full((rows, slots), -1, np.int32)
        for b, prompt in enumerate(padded):
            tokens[b, : len(prompt)] = prompt
            index[b, : len(prompt)] = np.arange(len(prompt))
        lengths = self._put(np.array([len(prompt) for prompt in padded], np.int32), P(ROWS))
        count = _rounded(sampling.max_new_tokens, NEW_STEP)
        prefill, decode = self._compiled(rows, slots, count, sampling)
        key = jax.random.key(sampling.seed)
        spec = P(ROWS, "sp")
        rope = self._rope(slots + count)
        token, cache = prefill(t.parameters, rope, self._put(tokens[:, order], spec), self._put(index[:, order], spec),
                               lengths, jax.random.fold_in(key, 0))  # fmt: skip
        for step in range(sampling.max_new_tokens):
            yield [int(x) for x in np.asarray(token)[: len(prompts)]]
            if step + 1 < sampling.max_new_tokens:
                token, cache = decode(t.parameters, rope, cache, token, lengths, np.int32(step),
                                      jax.random.fold_in(key, step + 1))  # fmt: skip

    def _compiled(self, rows: int, slots: int, count: int, sampling: SamplingSpec) -> tuple[Any, Any]:
        how = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.modality)
        key = ("generate", rows, slots, count, how)
        out = (self._everywhere(), None)
        if key not in self._programs:
            self._programs[key] = (
                jax.jit(partial(self._prefill, self._backend(slots), count, sampling), out_shardings=out),
                jax.jit(partial(self._decode, sampling), donate_argnums=2, out_shardings=out),
            )
        prefill, decode = self._programs[key]
        return prefill, decode

    # -- compiled ------------------------------------------------------------------------------------------------

    def _compute(self) -> Compute:
        t = self._trainer
        stream = stream_sharding(t.mesh, t.context.model.hidden_size)
        return Compute(
            dtype=jnp.dtype(t.options.compute_dtype),
            constrain=lambda x: jax.lax.with_sharding_constraint(x, stream) if x.shape[1] > 1 else x,
        )

    def _logits(self, hidden: jax.Array, head: jax.Array, modality: str) -> tuple[jax.Array, int]:
        """``[B,V]`` float32 over the modality's slice, and the slice's first id."""
        vocabulary = self._trainer.context.model.vocabulary
        if modality not in vocabulary.slices:
            raise ShapeError(f"generate: modality {modality!r} is not in this model's vocabulary")
        ids = vocabulary.slices[modality]
        rows = head[ids].astype(hidden.dtype)
        return jnp.einsum("be,ve->bv", hidden, rows, preferred_element_type=jnp.float32), ids.start

    def _prefill(
        self, backend: Any, count: int, sampling: SamplingSpec, parameters: Any, rope: RopeTables,
        tokens: jax.Array, index: jax.Array, lengths: jax.Array, key: jax.Array,
    ) -> tuple[jax.Array, Cache]:  # fmt: skip
        """First new token of each row, and the cache of its prompt. ``tokens`` and ``index`` ``[B,P]``, permuted."""
        t = self._trainer
        model = t.network.merge(parameters)
        segments = (index >= 0).astype(jnp.int32)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, given: Any) -> tuple[jax.Array, Any]:
            return backend.attend(q, k, v, AttentionMask("causal"), segments), (k, v)

        hidden, (k, v) = model.hidden(tokens, jnp.maximum(index, 0), rope, attend, how=self._compute())
        last = index == (lengths - 1)[:, None]
        ends = jnp.where(last[..., None], hidden, 0).sum(axis=1)
        logits, first = self._logits(ends, model.head, sampling.modality)
        shape = (*k.shape[:2], count, *k.shape[3:])
        cache = Cache(k, v, index, jnp.zeros(shape, k.dtype), jnp.zeros(shape, v.dtype))
        return sample(logits, key, sampling) + first, cache

    def _decode(
        self, sampling: SamplingSpec, parameters: Any, rope: RopeTables, cache: Cache, token: jax.Array,
        lengths: jax.Array, step: jax.Array, key: jax.Array,
    ) -> tuple[jax.Array, Cache]:  # fmt: skip
        """The token after ``token [B]``, which is new token number ``step``."""
        t = self._trainer
        model = t.network.merge(parameters)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, given: Any) -> tuple[jax.Array, Any]:
            prompt_k, prompt_v, new_k, new_v = given
            new_k = jax.lax.dynamic_update_slice_in_dim(new_k, k, step, axis=1)
            new_v = jax.lax.dynamic_update_slice_in_dim(new_v, v, step, axis=1)
            out = attend_cached(q, (prompt_k, prompt_v, new_k, new_v), cache.prompt_index, step)
            return out, (new_k, new_v)

        given = (cache.prompt_k, cache.prompt_v, cache.new_k, cache.new_v)
        hidden, (new_k, new_v) = model.hidden(
            token[:, None], (lengths + step)[:, None], rope, attend, given, self._compute()
        )
        logits, first = self._logits(hidden[:, 0], model.head, sampling.modality)
        return sample(logits, key, sampling) + first, cache._replace(new_k=new_k, new_v=new_v)

    def _score(
        self, backend: Any, parameters: Any, rope: RopeTables, tokens: jax.Array, targets: jax.Array,
        segments: jax.Array, positions: jax.Array,
    ) -> jax.Array:  # fmt: skip
        """``[B,P]`` float32 log-probability of each target, permuted, in slices of the sequence."""
        t = self._trainer
        model = t.network.merge(parameters)
        vocabulary = t.context.model.vocabulary

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, given: Any) -> tuple[jax.Array, Any]:
            return backend.attend(q, k, v, AttentionMask("causal"), segments), None

        hidden, _ = model.hidden(tokens, positions, rope, attend, how=self._compute())
        chunks = t.current.program.loss_chunks

        def part(of: tuple[jax.Array, jax.Array]) -> jax.Array:
            part_hidden, part_targets = of
            result = jnp.zeros(part_targets.shape, jnp.float32)
            for ids in vocabulary.slices.values():
                rows = model.head[ids].astype(part_hidden.dtype)
                logits = jnp.einsum("...e,ve->...v", part_hidden, rows, preferred_element_type=jnp.float32)
                local = jnp.clip(part_targets - ids.start, 0, ids.stop - ids.start - 1)
                chosen = jnp.take_along_axis(logits, local[..., None], axis=-1)[..., 0]
                mine = (part_targets >= ids.start) & (part_targets < ids.stop)
                result = jnp.where(mine, chosen - jax.nn.logsumexp(logits, axis=-1), result)
            return result

        parts = jax.lax.map(part, (chunks.split(hidden), chunks.split(targets)))
        return jnp.moveaxis(parts, 0, 2).reshape(targets.shape)
