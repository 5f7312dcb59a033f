"""Blocks by a library's fused attention, which knows whole blocks and the causal diagonal and no other mask.

A rank's queries and keys are cut into large chunks. A pair of chunks is skipped, computed by the fused attention
(whole, or the diagonal of a causal mask), or, where documents, windows or shards cut through it, by the kernel
``xla``. What the pairs give is put together by lse, in float32.

Shapes: B batch, C tokens, H query heads, K key-value heads, D head dim; c chunk of queries or keys; Nq, Nk chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from lwm_core.errors import UnsupportedError
from lwm_jax_ring.attention.blocks import Keys, Queries
from lwm_jax_ring.attention.kernels import xla
from lwm_jax_ring.attention.kernels.contract import precision

SKIP, WHOLE, MASKED, DIAGONAL = xla.SKIP, xla.WHOLE, xla.MASKED, xla.MASKED + 1


class Fused(Protocol):
    """A fused attention without a softmax scale; ``causal`` for the square diagonal. Static, compared by value."""

    dtypes: tuple[str, ...]

    def forward(self, q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> tuple[jax.Array, jax.Array]:
        """out ``[B,c,H,D]`` and natural-log lse ``[B,c,H]`` float32 of ``q [B,c,H,D]`` over ``k, v [B,c,K,D]``."""
        ...

    def backward(
        self, q: jax.Array, k: jax.Array, v: jax.Array, out: jax.Array, lse: jax.Array, dout: jax.Array, causal: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """This block's share of dq, and its dk and dv; ``out`` and ``lse`` are those over all keys of all blocks."""
        ...


class State(NamedTuple):
    """Attention over the keys so far, float32."""

    out: jax.Array  # [Nq,B,c,H,D]
    lse: jax.Array  # [Nq,B,c,H]


class Prepared(NamedTuple):
    """What all query chunks bring to the forward pass."""

    q: jax.Array  # [Nq,B,c,H,D], multiplied by the softmax scale
    mask: Queries  # by chunks


class Saved(NamedTuple):
    """What all query chunks bring to the backward pass."""

    q: jax.Array  # [Nq,B,c,H,D], multiplied by the softmax scale
    out: jax.Array  # [Nq,B,c,H,D]
    dout: jax.Array  # [Nq,B,c,H,D]
    lse: jax.Array  # [Nq,B,c,H]; +inf where nothing was seen
    mask: Queries  # by chunks


def split(x: jax.Array, chunk: int, fill: float = 0.0) -> jax.Array:
    """``[B,C,...]`` → ``[N,B,c,...]``, padded to whole chunks."""
    batch, length = x.shape[:2]
    count = -(-length // chunk)
    x = jnp.pad(x, ((0, 0), (0, count * chunk - length), *[(0, 0)] * (x.ndim - 2)), constant_values=fill)
    return jnp.moveaxis(x.reshape(batch, count, chunk, *x.shape[2:]), 1, 0)


def join(x: jax.Array, length: int) -> jax.Array:
    """The inverse of :func:`split`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def classify(queries: Queries, keys: Keys) -> jax.Array:
    """SKIP, WHOLE, DIAGONAL or MASKED for one pair of chunks; int32 scalar.

    DIAGONAL: each query sees the keys up to the one in its own place, and all are of one document.
    """
    kind = xla.classify(queries, keys)
    if queries.high.shape[-1] != keys.index.shape[-1]:
        return kind
    diagonal = (queries.high == keys.index).all() & (queries.low <= keys.index[0]).all() & (keys.index[0] >= 0)
    if queries.segments is not None:
        first = queries.segments[:, :1]
        diagonal &= ((queries.segments == first) & (keys.segments == first) & (first > 0)).all()
    return jnp.where((kind == MASKED) & diagonal, DIAGONAL, kind).astype(jnp.int32)


def merge(state: State, out: jax.Array, lse: jax.Array) -> State:
    """The state of one chunk after more keys, whose own attention is ``out`` and ``lse``."""
    total = jnp.logaddexp(state.lse, lse)
    base = jnp.where(jnp.isneginf(total), 0.0, total)
    old, new = (jnp.exp(part - base)[..., None] for part in (state.lse, lse))
    return State(state.out * old + out.astype(jnp.float32) * new, total)


@dataclass(frozen=True)
class FusedKernel:
    """See :class:`~lwm_jax_ring.attention.kernels.contract.Kernel`.

    Args:
        scale: softmax scale.
        block: tokens of a chunk.
        fused: computes whole blocks and the diagonal.
        masked: computes every other block; its scale is 1.
    """

    scale: float
    block: int
    fused: Fused
    masked: xla.XlaKernel

    def _scaled(self, q: jax.Array) -> jax.Array:
        if str(q.dtype) not in self.fused.dtypes:
            raise UnsupportedError(
                f"jax-ring: kernel 'cudnn' computes in {' or '.join(self.fused.dtypes)}, got {q.dtype}; "
                "use kernel = 'xla', or compute_dtype = 'bfloat16'"
            )
        return q * jnp.asarray(self.scale, q.dtype)

    def queries(self, q: jax.Array, mask: Queries, kv_heads: int) -> Prepared:
        return Prepared(split(self._scaled(q), self.block), xla.split_query_mask(mask, self.block))

    def start(self, queries: Prepared) -> State:
        shape = queries.q.shape
        return State(jnp.zeros(shape, jnp.float32), jnp.full(shape[:-1], -jnp.inf, jnp.float32))

    def absorb(self, state: State, queries: Prepared, k: jax.Array, v: jax.Array, keys: Keys) -> State:
        arrived = split(k, self.block), split(v, self.block), xla.split_key_mask(keys, self.block)

        def per_query(_, x):  # type: ignore[no-untyped-def]
            chunk_state, q, q_mask = x

            def per_key(state, y):  # type: ignore[no-untyped-def]
                k_c, v_c, k_mask = y
                branches = {
                    SKIP: lambda s: s,
                    WHOLE: lambda s: merge(s, *self.fused.forward(q, k_c, v_c, causal=False)),
                    MASKED: lambda s: merge(s, *self._masked_forward(q, q_mask, k_c, v_c, k_mask)),
                    DIAGONAL: lambda s: merge(s, *self.fused.forward(q, k_c, v_c, causal=True)),
                }
                kind = classify(q_mask, k_mask)
                return lax.switch(kind, [branches[n] for n in range(len(branches))], state), None

            return None, lax.scan(per_key, chunk_state, arrived)[0]

        return State(*lax.scan(per_query, None, (state, *queries))[1])

    def _masked_forward(
        self, q: jax.Array, q_mask: Queries, k: jax.Array, v: jax.Array, k_mask: Keys
    ) -> tuple[jax.Array, jax.Array]:
        kernel = self.masked
        prepared = kernel.queries(q, q_mask, k.shape[2])
        return kernel.finish(kernel.absorb(kernel.start(prepared), prepared, k, v, k_mask), q.shape[1])

    def finish(self, state: State, length: int) -> tuple[jax.Array, jax.Array]:
        return join(state.out, length), join(state.lse, length)

    def saved(
        self, q: jax.Array, out: jax.Array, dout: jax.Array, lse: jax.Array, mask: Queries, kv_heads: int
    ) -> Saved:
        parts = (split(x.astype(q.dtype), self.block) for x in (self._scaled(q), out, dout))
        return Saved(*parts, split(lse, self.block, jnp.inf), xla.split_query_mask(mask, self.block))

    def start_gradient(self, saved: Saved) -> jax.Array:
        return jnp.zeros(saved.q.shape, jnp.float32)

    def gradients(
        self, dq: jax.Array, saved: Saved, k: jax.Array, v: jax.Array, keys: Keys
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        k_split, v_split = split(k, self.block), split(v, self.block)
        zeros = jnp.zeros(k_split.shape, jnp.float32)

        def per_key(dq, x):  # type: ignore[no-untyped-def]
            dk, dv, k_c, v_c, k_mask = x

            def per_query(carry, y):  # type: ignore[no-untyped-def]
                dq_c, s = y

                def add(gradients):  # type: ignore[no-untyped-def]
                    return jax.tree.map(lambda sum_, g: sum_ + g.astype(jnp.float32), (dq_c, *carry), gradients)

                def fused(causal: bool):  # type: ignore[no-untyped-def]
                    return lambda: add(self.fused.backward(s.q, k_c, v_c, s.out, s.lse, s.dout, causal))

                branches = {
                    SKIP: lambda: (dq_c, *carry),
                    WHOLE: fused(causal=False),
                    MASKED: lambda: add(self._masked_backward(s, k_c, v_c, k_mask)),
                    DIAGONAL: fused(causal=True),
                }
                dq_c, *carry = lax.switch(classify(s.mask, k_mask), [branches[n] for n in range(len(branches))])
                return tuple(carry), dq_c

            (dk, dv), dq = lax.scan(per_query, (dk, dv), (dq, saved))
            return dq, (dk, dv)

        chunks = zeros, zeros, k_split, v_split, xla.split_key_mask(keys, self.block)
        dq, (dk, dv) = lax.scan(per_key, dq, chunks)
        return dq, join(dk, k.shape[1]), join(dv, k.shape[1])

    def _masked_backward(
        self, s: Saved, k: jax.Array, v: jax.Array, k_mask: Keys
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        kernel = self.masked
        saved = kernel.saved(s.q, s.out, s.dout, s.lse, s.mask, k.shape[2])
        dq, dk, dv = kernel.gradients(kernel.start_gradient(saved), saved, k, v, k_mask)
        return kernel.finish_gradient(dq, s.q.shape[1]), dk, dv

    def finish_gradient(self, dq: jax.Array, length: int) -> jax.Array:
        return join(dq, length) * self.scale


@dataclass(frozen=True)
class InterpretedFused:
    """The fused attention in plain operations, to play the kernel where its library does not run."""

    dtypes: tuple[str, ...] = ("float32", "bfloat16")

    def _scores(self, q: jax.Array, k: jax.Array, causal: bool) -> jax.Array:
        scores = _product("bqkgd,btkd->bkgqt", _grouped(q, k), k)
        return jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf) if causal else scores

    def forward(self, q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> tuple[jax.Array, jax.Array]:
        scores = self._scores(q, k, causal)
        lse = jax.nn.logsumexp(scores, axis=-1)
        weights = jnp.exp(scores - lse[..., None]).astype(v.dtype)
        out = _product("bkgqt,btkd->bqkgd", weights, v)
        return out.reshape(q.shape).astype(q.dtype), jnp.moveaxis(lse, -1, 1).reshape(q.shape[:-1])

    def backward(
        self, q: jax.Array, k: jax.Array, v: jax.Array, out: jax.Array, lse: jax.Array, dout: jax.Array, causal: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        q_g, out_g, dout_g = (_grouped(x, k) for x in (q, out, dout))
        lse_g = jnp.moveaxis(lse.reshape(q_g.shape[:-1]), 1, -1)[..., None]
        weights = jnp.exp(self._scores(q, k, causal) - lse_g)
        delta = (out_g.astype(jnp.float32) * dout_g.astype(jnp.float32)).sum(-1)
        dweights = _product("bqkgd,btkd->bkgqt", dout_g, v)
        dscores = (weights * (dweights - jnp.moveaxis(delta, 1, -1)[..., None])).astype(q.dtype)
        dq = _product("bkgqt,btkd->bqkgd", dscores, k).reshape(q.shape)
        dk = _product("bkgqt,bqkgd->btkd", dscores, q_g)
        dv = _product("bkgqt,bqkgd->btkd", weights.astype(q.dtype), dout_g)
        return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """``einsum`` with a float32 result."""
    return jnp.einsum(subscripts, a, b, precision=precision(a), preferred_element_type=jnp.float32)


def _grouped(x: jax.Array, k: jax.Array) -> jax.Array:
    """``[B,c,H,D]`` → ``[B,c,K,G,D]``: the query heads by the key-value head that they share."""
    return x.reshape(*x.shape[:2], k.shape[2], -1, x.shape[3])
