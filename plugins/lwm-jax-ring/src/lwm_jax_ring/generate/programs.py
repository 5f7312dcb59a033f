"""What is compiled to read and write: each for the sizes that come, which :mod:`rows` rounds to a few.

A chunk goes through one program a layer, the same for all layers, so that compiling takes no longer for more of them
and memory is that of one. Writing a token is one program through all layers: between its small steps there is no time
to go back to the host.

Shapes: B rows, S slots of a chunk, c few tokens, E hidden size, V ids of a modality, T slots of a rank; n ranks.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lwm_core.attention import AttentionMask
from lwm_core.attention_cost import repeated_kv_heads
from lwm_core.errors import UnsupportedError
from lwm_core.protocols import AttentionAxes, SamplingSpec
from lwm_jax_ring.attention.options import AttentionOptions
from lwm_jax_ring.attention.strategies import make_kernel
from lwm_jax_ring.attention.ulysses import repeat_kv_heads
from lwm_jax_ring.generate.cache import (
    FILL,
    HELD,
    PAGE,
    TAIL_HELD,
    Cache,
    LayerCache,
    empty_layer,
    flushed,
    grown,
    layer_specs,
    put,
)
from lwm_jax_ring.generate.reading import BLOCK, Reading, few_over_all, merged, over_cache
from lwm_jax_ring.generate.sample import guide, sample
from lwm_jax_ring.generate.weights import Weights
from lwm_jax_ring.model.llama import Compute, rms_norm
from lwm_jax_ring.model.rope import RopeTables, rope_angles
from lwm_jax_ring.model.sharding import ROWS

if TYPE_CHECKING:
    from lwm_jax_ring.train.trainer import JaxTrainer

CAUSAL = AttentionMask("causal")
CHUNK_HEADS, FEW_HEADS, LSE = P(ROWS, "sp", "tp", None), P(ROWS, None, "tp", None), P(ROWS, "sp", "tp")


class Programs:
    """Of a trainer's mesh and network, for any number of rows, sizes and stages on that mesh."""

    def __init__(self, trainer: JaxTrainer) -> None:
        current, model = trainer.current, trainer.context.model
        options = current.attention.options
        own = options if isinstance(options, AttentionOptions) else AttentionOptions()  # another backend's are its own
        self.mesh, self.model, self.kind = current.mesh, model, trainer.options.cache
        self.ranks = self.mesh.shape["sp"]
        self._network, self._factory, self._options = trainer.network, trainer.context.attention, options
        kernel = make_kernel(own, self.mesh.devices.flat[0].platform, BLOCK, model.head_dim)
        self._reading = Reading(kernel, self.ranks, own.softcap)
        self._how = replace(current.program.compute, remat="none")
        self._alone = trainer.processes.world == 1
        self._layers: dict[tuple[int, bool], Any] = {}
        self._steps: dict[Any, tuple[Any, Any]] = {}
        cache, layer = self.sharding(self._cache_specs()), self.sharding(layer_specs(self.kind))
        stream, rows = None, self.sharding(P(ROWS, None))
        self.begin = jax.jit(self._begin)
        self.end = jax.jit(self._end, donate_argnums=(1, 4), out_shardings=(rows, self.sharding(HELD)))
        self.few = jax.jit(self._few, donate_argnums=1, out_shardings=(rows, cache))
        self.flush = jax.jit(self._flush, donate_argnums=0, out_shardings=cache)
        self._layer_out = (stream, layer)
        self._cache_out = cache

    def sharding(self, specs: Any) -> Any:
        """The specs of a tree, on the mesh."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs, is_leaf=lambda one: isinstance(one, P))

    def _cache_specs(self) -> Cache:
        return Cache((layer_specs(self.kind),) * self.model.num_layers, HELD, TAIL_HELD)

    def _local(self, function: Any, takes: Any, gives: Any) -> Any:
        return jax.shard_map(function, mesh=self.mesh, in_specs=takes, out_specs=gives, check_vma=False)

    # -- room ----------------------------------------------------------------------------------------------------

    def empty(self, rows: int, slots: int) -> Cache:
        """A cache of ``slots`` slots a rank, none in use."""
        m = self.model
        heads = repeated_kv_heads(m.num_heads, m.num_kv_heads, self.mesh.shape["tp"])

        def made() -> Cache:
            layer = empty_layer(self.kind, self._how.dtype, rows, heads, slots * self.ranks, m.head_dim)
            held = jnp.zeros((rows, slots * self.ranks), jnp.int32)
            return Cache((layer,) * m.num_layers, held, held[:, :PAGE])

        cache: Cache = jax.jit(made, out_shardings=self._cache_out)()
        return cache

    def grow(self, cache: Cache, slots: int) -> Cache:
        """With room for ``slots`` slots a rank; no more than a layer is there twice, if the caller keeps none."""
        specs = layer_specs(self.kind)
        wider = jax.jit(self._local(partial(grown, slots=slots), (specs,), specs))
        pad = jax.jit(self._local(lambda x: jnp.pad(x, ((0, 0), (0, slots - x.shape[1]))), (HELD,), HELD))
        layers, held, tail_held = list(cache.layers), pad(cache.held), cache.tail_held
        del cache
        for number, layer in enumerate(layers):
            layers[number] = wider(layer)
        return Cache(tuple(layers), held, tail_held)

    def conditional(self, cache: Cache | None, ends: jax.Array) -> tuple[Cache | None, jax.Array]:
        """Of pairs of rows the first of each, by themselves; no more than a layer is there twice."""

        def firsts(tree: Any, specs: Any) -> Any:
            return jax.jit(self._local(lambda own: jax.tree.map(lambda x: x[0::2], own), (specs,), specs))(tree)

        ends = firsts(ends, P(ROWS, None))
        if cache is None:
            return None, ends
        layers, (held, tail_held) = list(cache.layers), firsts((cache.held, cache.tail_held), (HELD, TAIL_HELD))
        del cache
        for number, layer in enumerate(layers):
            layers[number] = firsts(layer, layer_specs(self.kind))
        return Cache(tuple(layers), held, tail_held), ends

    def _flush(self, cache: Cache, fill: jax.Array, turn: jax.Array) -> Cache:
        """The tail as a page of rank ``turn``, and an empty tail."""

        def local(cache: Cache, fill: jax.Array) -> Cache:
            mine = lax.axis_index("sp") == turn
            layers = tuple(flushed(layer, cache.tail_held, fill[0], mine) for layer in cache.layers)
            here = lax.dynamic_slice_in_dim(cache.held, fill[0], PAGE, axis=1)
            here = jnp.where(mine, cache.tail_held, here)
            held = lax.dynamic_update_slice_in_dim(cache.held, here, fill[0], axis=1)
            return Cache(layers, held, jnp.zeros_like(cache.tail_held))

        specs = self._cache_specs()
        flushed_cache: Cache = self._local(local, (specs, FILL), specs)(cache, fill)
        return flushed_cache

    # -- a chunk -------------------------------------------------------------------------------------------------

    def _begin(
        self, table: jax.Array, rope: RopeTables, tokens: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The stream ``[B,S,E]`` before the first layer, and the angles."""
        x = self._how.gather_table(table)[tokens].astype(self._how.dtype)
        return self._how.constrain(x), *rope_angles(rope, positions)

    def layer(self, slots: int, fresh: bool) -> Any:
        """The program of one layer for chunks of ``slots``: (parameters, cache, stream, cos, sin, held, chunk_held
        ``[B,S]``, fill) → (stream, cache), the cache and the stream given away. ``fresh``: nothing is cached yet."""
        if (slots, fresh) not in self._layers:
            backend = self._factory.build(self._options, self.mesh, AttentionAxes(), slots)
            if not fresh and not hasattr(backend, "forward"):
                raise UnsupportedError(
                    "generate: this attention gives no lse (it has no method forward), so that no prompt can be read "
                    "in chunks; set trainer.read_chunk to the length of the longest prompt"
                )
            function = partial(self._layer, backend, fresh)
            self._layers[slots, fresh] = jax.jit(function, donate_argnums=(1, 2), out_shardings=self._layer_out)
        return self._layers[slots, fresh]

    def _layer(
        self, backend: Any, fresh: bool, parameters: Any, layer: LayerCache, x: jax.Array, cos: jax.Array,
        sin: jax.Array, held: jax.Array, chunk_held: jax.Array, fill: jax.Array,
    ) -> tuple[jax.Array, LayerCache]:  # fmt: skip
        specs = layer_specs(self.kind)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, given: None) -> tuple[jax.Array, LayerCache]:
            # Put away before the cache is seen, or a copy of all of it would be made; as held, they are not seen yet.
            keep = self._local(_kept, (specs, CHUNK_HEADS, CHUNK_HEADS, HELD, FILL), specs)
            kept = keep(layer, *repeat_kv_heads(q, k, v, self.mesh.shape["tp"]), chunk_held, fill)
            if fresh:
                return backend.attend(q, k, v, CAUSAL, chunk_held), kept
            new, new_lse = backend.forward(q, k, v, CAUSAL, chunk_held)
            over = self._local(
                partial(over_cache, how=self._reading), (CHUNK_HEADS, specs, HELD, FILL), (CHUNK_HEADS, LSE)
            )
            return merged(*over(q, kept, held, fill), new, new_lse).astype(q.dtype), kept

        block = self._network.block(self._how.gather_layer(parameters))
        given: tuple[jax.Array, LayerCache] = block(x, cos, sin, attend, None, self._how)
        return given

    def _end(
        self, norm: Any, before: jax.Array, x: jax.Array, last: jax.Array, held: jax.Array, chunk_held: jax.Array,
        fill: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        """The stream ``[B,E]`` after the last token of the rows that end here, ``before`` of others; the slots held."""
        ends = self._normed(norm, jnp.where(last[..., None] > 0, x, 0).sum(axis=1))
        put = self._local(
            lambda held, new, fill: lax.dynamic_update_slice_in_dim(held, new, fill[0], axis=1),
            (HELD, HELD, FILL),
            HELD,
        )
        return jnp.where(last.any(axis=1)[:, None], ends, before), put(held, chunk_held, fill)

    def _normed(self, norm: Any, x: jax.Array) -> jax.Array:
        return rms_norm(x, norm["weight"], self.model.rms_norm_eps)

    # -- a few tokens --------------------------------------------------------------------------------------------

    def _few(
        self, weights: Weights, cache: Cache, rope: RopeTables, tokens: jax.Array, positions: jax.Array,
        new: jax.Array, last: jax.Array, before: jax.Array, at: jax.Array, fill: jax.Array,
    ) -> tuple[jax.Array, Cache]:  # fmt: skip
        """Read ``tokens [B,c]``, where ``new [B,c]`` says so, into the tail from slot ``at`` on; see :meth:`_end`."""
        x, cache = self._through(weights, cache, rope, tokens, positions, new, at, fill)
        ends = self._normed(weights.norm, jnp.where(last[..., None] > 0, x, 0).sum(axis=1))
        return jnp.where(last.any(axis=1)[:, None], ends, before), cache

    def _through(
        self, weights: Weights, cache: Cache, rope: RopeTables, tokens: jax.Array, positions: jax.Array,
        new: jax.Array, at: jax.Array, fill: jax.Array,
    ) -> tuple[jax.Array, Cache]:  # fmt: skip
        """The stream ``[B,c,E]`` after the last layer, and the cache."""
        tail_held = lax.dynamic_update_slice_in_dim(cache.tail_held, new, at, axis=1)
        own = lax.iota(jnp.int32, PAGE) <= at + lax.iota(jnp.int32, tokens.shape[1])[:, None]
        seen = (tail_held[:, None] > 0) & own
        x = weights.embed_tokens[tokens].astype(self._how.dtype)
        cos, sin = rope_angles(rope, positions)
        specs, tail = layer_specs(self.kind), layer_specs(self.kind).tail_k
        takes = (FEW_HEADS, FEW_HEADS, FEW_HEADS, specs, HELD, FILL, P(ROWS, None, None))

        def local(q, k, v, layer, held, fill, seen):  # type: ignore[no-untyped-def]
            tails = (
                lax.dynamic_update_slice_in_dim(kept, jnp.swapaxes(x, 1, 2).astype(kept.dtype), at, axis=2)
                for kept, x in ((layer.tail_k, k), (layer.tail_v, v))
            )
            layer = layer._replace(**dict(zip(("tail_k", "tail_v"), tails, strict=True)))
            return few_over_all(q, layer, held, fill, seen, self._reading), layer.tail_k, layer.tail_v

        over = self._local(local, takes, (FEW_HEADS, tail, tail))

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: LayerCache) -> tuple[jax.Array, LayerCache]:
            k, v = repeat_kv_heads(q, k, v, self.mesh.shape["tp"])
            out, tail_k, tail_v = over(q, k, v, layer, cache.held, fill, seen)
            return out, layer._replace(tail_k=tail_k, tail_v=tail_v)

        layers = []
        for parameters, layer in zip(weights.layers, cache.layers, strict=True):
            x, layer = self._network.block(parameters)(x, cos, sin, attend, layer, Compute(dtype=self._how.dtype))
            layers.append(layer)
        return x, Cache(tuple(layers), cache.held, tail_held)

    # -- a token -------------------------------------------------------------------------------------------------

    def draws(self, sampling: SamplingSpec, guided: bool) -> tuple[Any, Any]:
        """Two programs: (head, ends, key, number) → the token ``[B]`` that is drawn number ``number``; and the same
        after one more token: (weights, cache, rope, token, positions, at, fill, key, number) → token, ends, cache.
        ``guided``: rows are pairs, a conditional one and its unconditional one, for which one token is drawn."""
        how = (replace(sampling, seed=0, max_new_tokens=0, stop_ids=()), guided)
        if how not in self._steps:
            token = None if self._alone else self.sharding(P())
            self._steps[how] = (
                jax.jit(partial(self._draw, *how), out_shardings=token),
                jax.jit(
                    partial(self._step, *how),
                    donate_argnums=1,
                    out_shardings=(token, self.sharding(P(ROWS, None)), self._cache_out),
                ),
            )
        return self._steps[how]

    def _draw(
        self, sampling: SamplingSpec, guided: bool, head: jax.Array, ends: jax.Array, key: jax.Array, number: jax.Array
    ) -> jax.Array:
        vocabulary = self.model.vocabulary
        ids, first = sampling.drawn_ids(vocabulary, guided=guided), vocabulary.slices[sampling.modality].start
        logits = jnp.einsum("be,ve->bv", ends, head, preferred_element_type=jnp.float32)
        logits = logits[:, ids.start - first : ids.stop - first]
        if guided:
            logits = guide(logits, sampling.guidance)
        token = sample(logits, jax.random.fold_in(key, number), sampling) + ids.start
        return jnp.repeat(token, 2) if guided else token

    def _step(
        self, sampling: SamplingSpec, guided: bool, weights: Weights, cache: Cache, rope: RopeTables, token: jax.Array,
        positions: jax.Array, at: jax.Array, fill: jax.Array, key: jax.Array, number: jax.Array,
    ) -> tuple[jax.Array, jax.Array, Cache]:  # fmt: skip
        one = jnp.ones((token.shape[0], 1), jnp.int32)
        x, cache = self._through(weights, cache, rope, token[:, None], positions[:, None], one, at, fill)
        ends = self._normed(weights.norm, x[:, 0])
        return self._draw(sampling, guided, weights.heads[sampling.modality], ends, key, number), ends, cache


def _kept(layer: LayerCache, k: jax.Array, v: jax.Array, held: jax.Array, fill: jax.Array) -> LayerCache:
    """This device's keys and values ``[B,c,K,D]`` of a chunk, put into its pages."""
    used = held[..., None, None] > 0
    kept = (put(into, jnp.swapaxes(jnp.where(used, x, 0), 1, 2), fill[0]) for into, x in ((layer.k, k), (layer.v, v)))
    return layer._replace(**dict(zip(("k", "v"), kept, strict=True)))
