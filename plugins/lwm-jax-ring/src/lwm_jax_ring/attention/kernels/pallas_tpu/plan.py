"""Before the kernel runs: how a call is cut into blocks, what each pair of blocks needs, and how arrays are laid out.

Shapes: B batch, C queries of a rank, T keys of a rank, H query heads, K key-value heads, D head dim; Cp, Tp, Dp the
same, padded; Nq, Nk numbers of blocks. R is B where rows of a batch have masks of their own, else 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lwm_core.errors import ShapeError, UnsupportedError
from lwm_jax_ring.attention.blocks import Keys, Queries
from lwm_jax_ring.attention.kernels.xla import MASKED, SKIP, WHOLE

LANES = 128
LARGEST_DIM = 256
LARGEST_PLAN = 512 * 1024
"""Bytes of the plan that is copied to scalar memory, where a TPU core has 1 MiB and the compiler wants some itself."""

_LAST = jnp.iinfo(jnp.int32).max
_CODES_A_WORD = 16


def _up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def block_length(length: int, limit: int) -> int:
    """Length of a block: a multiple of 128, at most ``limit``, that pads ``length`` least in as few blocks."""
    return _up(-(-length // -(-length // limit)), LANES)


@dataclass(frozen=True)
class Cut:
    """All that is static about a call, the queries already padded to whole blocks."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int
    block_q: int
    block_k: int
    mask_rows: int

    @property
    def groups(self) -> int:
        """Query heads a key-value head."""
        return self.heads // self.kv_heads

    def kv_head(self, head: Any) -> Any:
        """Key-value head of a query head that is known when the kernel runs."""
        return head if self.groups == 1 else lax.div(head, self.groups)

    @property
    def count_q(self) -> int:
        """Blocks of queries, Nq."""
        return -(-self.queries // self.block_q)

    @property
    def count_k(self) -> int:
        """Blocks of keys, Nk."""
        return -(-self.keys // self.block_k)

    @property
    def padded_keys(self) -> int:
        """Tp."""
        return self.count_k * self.block_k

    def estimate(self, products: int, *arrays: Any) -> pl.CostEstimate:
        """What XLA's scheduler is told: ``products`` matrix products over all pairs, and each array moved once."""
        pairs = self.batch * self.heads * self.queries * self.keys
        moved = sum(array.size * array.dtype.itemsize for array in arrays)
        return pl.CostEstimate(flops=2 * products * pairs * self.dim, transcendentals=pairs, bytes_accessed=moved)


class Prepared(NamedTuple):
    """The query side of a call, made once for all hops."""

    q: jax.Array  # [B, H, Cp, Dp]
    rows: jax.Array  # [R, 2 or 3, Cp], see query_rows


def padded_dim(dim: int) -> int:
    """Head dim that the kernels see: 64, 128 or 256."""
    return 64 if dim <= 64 else _up(dim, LANES)


def _block(length: int, limit: int | None, q: jax.Array) -> int:
    """Length of a block of ``length`` tokens; no limit: what fits the 16 MiB of VMEM that a kernel has on TPU v4."""
    usual = 1024 if q.dtype == jnp.bfloat16 and q.shape[-1] <= LANES else 512
    return block_length(length, usual if limit is None else limit)


def prepare(q: jax.Array, queries: Queries, block_q: int | None) -> Prepared:
    """Check ``q [B,C,H,D]``, lay it out and pad it to whole blocks.

    Raises:
        ShapeError: the block is not a positive multiple of 128.
        UnsupportedError: a dtype other than bfloat16 and float32, or a head dim over 256.
    """
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise UnsupportedError(f"pallas-tpu: q is {q.dtype}; expected bfloat16 or float32")
    if q.shape[-1] > LARGEST_DIM:
        raise UnsupportedError(f"pallas-tpu: head dim {q.shape[-1]} is over {LARGEST_DIM}; use the xla kernel")
    if block_q is not None and (block_q < LANES or block_q % LANES):
        raise ShapeError(f"pallas-tpu: block_q is {block_q}; expected a positive multiple of {LANES}")
    length = _up(q.shape[1], _block(q.shape[1], block_q, q))
    return Prepared(heads_first(q, length, padded_dim(q.shape[-1])), query_rows(queries, q.shape[0], length))


def cut(prepared: Prepared, k: jax.Array, v: jax.Array, keys: Keys, block_q: int | None, block_k: int | None) -> Cut:
    """Check ``k, v [B,T,K,D]`` against the queries and cut both into blocks.

    Raises:
        ShapeError: shapes do not fit each other, or a block is not a positive multiple of 128.
        UnsupportedError: k or v has another dtype than q.
    """
    q = prepared.q
    batch, heads, length, dim = q.shape
    if k.shape != v.shape or k.shape[0] != batch or padded_dim(k.shape[3]) != dim:
        raise ShapeError(
            f"pallas-tpu: q is {q.shape} (padded, heads first), k {k.shape}, v {v.shape}; expected [B,T,K,D] twice"
        )
    if heads % k.shape[2]:
        raise ShapeError(f"pallas-tpu: {heads} query heads over {k.shape[2]} key-value heads; expected a multiple")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise UnsupportedError(f"pallas-tpu: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; expected one dtype")
    if (prepared.rows.shape[1] == 2) != (keys.segments is None):
        raise ShapeError(
            "pallas-tpu: segment ids are given on one side only; give them to queries and keys, or to none"
        )
    if block_k is not None and (block_k < LANES or block_k % LANES):
        raise ShapeError(f"pallas-tpu: block_k is {block_k}; expected a positive multiple of {LANES}")
    return Cut(
        batch, heads, k.shape[2], length, k.shape[1], dim,
        _block(length, block_q, q), _block(k.shape[1], block_k, q), prepared.rows.shape[0],
    )  # fmt: skip


def heads_first(x: jax.Array, length: int, dim: int) -> jax.Array:
    """``[B, C, H, D]`` → ``[B, H, length, dim]``, padded with zeros."""
    x = jnp.swapaxes(x, 1, 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, dim - x.shape[3])))


def tokens_first(x: jax.Array, length: int, dim: int) -> jax.Array:
    """``[B, H, Cp, Dp]`` → ``[B, length, H, dim]``, the padding left off."""
    return jnp.swapaxes(x[:, :, :length, :dim], 1, 2)


def _padded(x: jax.Array, length: int, fill: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])], constant_values=fill)


def query_rows(queries: Queries, batch: int, length: int) -> jax.Array:
    """Lowest and highest index that each query sees, and its segment id if there are any: ``[R, 2 or 3, Cp]`` int32.

    Whatever keeps a query from seeing anything (no segment, padding) is told by a highest index below every other,
    and what keeps a key from being seen (index −1) by a lowest index of at least 0.
    """
    low, high, segments = jnp.maximum(queries.low, 0), queries.high, queries.segments
    fields = [low, high] if segments is None else [low, jnp.where(segments == 0, -2, high), segments]
    shape = (low.shape[0] if segments is None else batch, low.shape[1])
    fills = (0, -2, 0)
    padded = [_padded(jnp.broadcast_to(x, shape), length, fill) for x, fill in zip(fields, fills, strict=False)]
    return jnp.stack(padded, axis=1).astype(jnp.int32)


def key_rows(keys: Keys, cut: Cut) -> jax.Array:
    """Index of each key, and its segment id if there are any: ``[1 or B, 1 or 2, Tp]`` int32; padding has index −1."""
    length = cut.padded_keys
    index = _padded(keys.index, length, -1)
    if keys.segments is None:
        return index[None, None].astype(jnp.int32)
    segments = _padded(keys.segments, length, 0)
    return jnp.stack([jnp.broadcast_to(index, segments.shape), segments], axis=1).astype(jnp.int32)


def classify(q_rows: jax.Array, k_rows: jax.Array, cut: Cut) -> jax.Array:
    """SKIP, WHOLE or MASKED for every pair of blocks: ``[R, Nq, Nk]`` int32.

    The rule of ``xla.classify``, from the extremes of each block, but row by row of the batch, and with tokens that
    see nothing and are seen by nobody left out of the extremes.
    """
    low, high, *q_segments = jnp.moveaxis(q_rows.reshape(cut.mask_rows, -1, cut.count_q, cut.block_q), 1, 0)
    index, *k_segments = jnp.moveaxis(k_rows.reshape(k_rows.shape[0], -1, cut.count_k, cut.block_k), 1, 0)
    sees, is_seen = low <= high, index >= 0
    if q_segments:
        is_seen &= k_segments[0] != 0

    def least(x: jax.Array, where: jax.Array) -> jax.Array:
        return jnp.where(where, x, _LAST).min(axis=-1)

    def most(x: jax.Array, where: jax.Array) -> jax.Array:
        return jnp.where(where, x, -2).max(axis=-1)

    def pair(of_queries: jax.Array, of_keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        return of_queries[:, :, None], of_keys[:, None, :]

    lowest, key_most = pair(least(low, sees), most(index, is_seen))
    highest, key_least = pair(most(high, sees), least(index, is_seen))
    low_most, key_first = pair(low.max(axis=-1), index.min(axis=-1))
    high_least, key_last = pair(high.min(axis=-1), index.max(axis=-1))
    meets = (key_least <= highest) & (key_most >= lowest)
    whole = (low_most <= key_first) & (key_last <= high_least)
    if q_segments:
        q_least, k_least = pair(least(q_segments[0], sees), least(k_segments[0], is_seen))
        q_most, k_most = pair(most(q_segments[0], sees), most(k_segments[0], is_seen))
        k_zero = (k_segments[0] == 0).any(axis=-1)[:, None, :]
        meets &= (k_least <= q_most) & (k_most >= q_least)
        whole &= (q_least == q_most) & (k_least == k_most) & (q_least == k_least) & ~k_zero
    return jnp.where(meets, jnp.where(whole, WHOLE, MASKED), SKIP).astype(jnp.int32)


class Visits(NamedTuple):
    """Which inner blocks each outer block visits, as it is handed to the kernel in scalar memory; all int32.

    Of a mask that is an interval only one run of blocks is ever live, or nearly, so a first and a last are enough to
    fetch nothing in vain; the codes tell what is to be done between them.
    """

    words: jax.Array  # [R · outer · words], 16 codes of two bits a word
    first: jax.Array  # [R · outer]
    last: jax.Array  # [R · outer]


@dataclass(frozen=True)
class Walk:
    """How a kernel reads its :class:`Visits`; used by index maps and bodies alike."""

    rows: int
    outer: int
    words: int

    def _at(self, row: Any, outer: Any) -> Any:
        return row * self.outer + outer if self.rows > 1 else outer

    def block(self, visits: Visits, row: Any, outer: Any, step: Any) -> Any:
        """The inner block at ``step``: past the last it is the last again, so that nothing is fetched."""
        at = self._at(row, outer)
        return jnp.minimum(visits.first[at] + step, visits.last[at])

    def code(self, visits: Visits, row: Any, outer: Any, step: Any) -> Any:
        """What is to be done at ``step``."""
        at = self._at(row, outer)
        inner = self.block(visits, row, outer, step)
        word = visits.words[at * self.words + lax.div(inner, _CODES_A_WORD)]
        code = lax.shift_right_logical(word, 2 * lax.rem(inner, _CODES_A_WORD)) & 3
        return jnp.where(visits.first[at] + step <= visits.last[at], code, SKIP)


def visits(codes: jax.Array) -> tuple[Visits, Walk, jax.Array]:
    """Pack ``codes [R, outer, inner]`` for a kernel that walks the inner blocks of one outer block after the other.

    Returns:
        the visits, how to read them, and the number of steps that the longest walk takes (int32 scalar, at least 1).

    Raises:
        UnsupportedError: they would not fit the scalar memory.
    """
    rows, outer, inner = codes.shape
    words = -(-inner // _CODES_A_WORD)
    size = 4 * rows * outer * (words + 2)
    if size > LARGEST_PLAN:
        raise UnsupportedError(
            f"pallas-tpu: the plan of {outer} by {inner} blocks in {rows} rows takes {size} bytes of scalar memory, "
            f"over {LARGEST_PLAN}; use larger blocks, fewer tokens a rank, or fewer rows a rank"
        )
    live = codes != SKIP
    some = live.any(axis=-1)
    first = jnp.where(some, jnp.argmax(live, axis=-1), 0)
    last = jnp.where(some, inner - 1 - jnp.argmax(live[..., ::-1], axis=-1), 0)
    steps = (last - first).max() + 1
    # An outer block with nothing to do stays on the inner block that was fetched last: the code there is SKIP.
    before = lax.cummax(jnp.where(some, lax.broadcasted_iota(jnp.int32, some.shape, 1), 0), axis=1)
    first, last = jnp.where(some, first, jnp.take_along_axis(last, before, 1)), jnp.take_along_axis(last, before, 1)
    codes = jnp.pad(codes, ((0, 0), (0, 0), (0, words * _CODES_A_WORD - inner))).astype(jnp.uint32)
    places = 2 * lax.iota(jnp.uint32, _CODES_A_WORD)
    packed = (codes.reshape(rows, outer, words, _CODES_A_WORD) << places).sum(axis=-1, dtype=jnp.uint32)
    flat = Visits(
        lax.bitcast_convert_type(packed, jnp.int32).reshape(-1),
        first.astype(jnp.int32).reshape(-1),
        last.astype(jnp.int32).reshape(-1),
    )
    return flat, Walk(rows, outer, words), steps.astype(jnp.int32)


def parallel(outer: int, inner: int) -> pltpu.CompilerParams:
    """``outer`` grid dimensions that cores may share, then ``inner`` that follow one another."""
    return pltpu.CompilerParams(dimension_semantics=("parallel",) * outer + ("arbitrary",) * inner)
