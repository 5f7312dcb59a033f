"""One hop backward, from the lse of the whole ring: two kernels, one for dq and one for dk and dv.

Both make the weights anew, ``exp(logits − lse)``. The first walks the blocks of keys that a block of queries visits,
its scores ``[queries, keys]``; the second the blocks of queries that visit a block of keys, head by head of the group,
its scores turned, ``[keys, queries]``, so that every product is one a TPU does without turning the larger side.

Shapes: B batch, C queries, T keys, H query heads, K key-value heads, D head dim; R is 1 or B.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lwm_jax_ring.attention.blocks import Keys
from lwm_jax_ring.attention.kernels.pallas_tpu import plan
from lwm_jax_ring.attention.kernels.pallas_tpu.inside import UNSEEN, Logits, across, column, dot, fields, parts, seen
from lwm_jax_ring.attention.kernels.xla import MASKED, WHOLE

PART_K = 256

_NEVER = 1.0e30
"""Stands for lse where a query sees nothing, on this hop or any: its weights come out 0. Finite, as UNSEEN is."""


def _dq_kernel(
    words, first, last, q, k, v, dout, stats, q_mask, k_mask, dq_in, dq, lse, delta, *, walk: plan.Walk, logits: Logits
) -> None:  # type: ignore[no-untyped-def]
    batch, block, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    code = walk.code(plan.Visits(words, first, last), batch, block, step)

    @pl.when(step == 0)
    def _() -> None:
        dq[...] = dq_in[...]
        lse[...], delta[...] = column(stats[:1, :]), column(stats[1:2, :])

    def absorb(masked: bool) -> None:
        of_queries = [column(field) for field in fields(q_mask)] if masked else []
        for part in parts(k.shape[0], PART_K):
            scores = logits.capped(dot(q[...], k[part, :], 1, 1))
            slope, width = logits.slope(scores), scores.shape[1]
            if masked:
                spread = [across(field, width) for field in of_queries]
                scores = jnp.where(seen(spread, [field[:, part] for field in fields(k_mask)]), scores, UNSEEN)
            weights = jnp.exp(scores - across(lse[...], width))
            dscores = weights * (dot(dout[...], v[part, :], 1, 1) - across(delta[...], width)) * slope
            dq[...] += dot(dscores.astype(k.dtype), k[part, :], 1, 0)

    pl.when(code == WHOLE)(partial(absorb, masked=False))
    pl.when(code == MASKED)(partial(absorb, masked=True))


def _dkv_kernel(
    words, first, last, q, k, v, dout, stats, q_mask, k_mask, dk, dv, *, walk: plan.Walk, logits: Logits
) -> None:  # type: ignore[no-untyped-def]
    batch, block, group, step = (pl.program_id(axis) for axis in (0, 2, 3, 4))
    code = walk.code(plan.Visits(words, first, last), batch, block, step)

    @pl.when((group == 0) & (step == 0))
    def _() -> None:
        dk[...] = jnp.zeros_like(dk)
        dv[...] = jnp.zeros_like(dv)

    def absorb(masked: bool) -> None:
        for part in parts(k.shape[0], PART_K):
            scores = logits.capped(dot(k[part, :], q[...], 1, 1))
            slope = logits.slope(scores)
            if masked:
                spread = [across(column(field[:, part]), scores.shape[1]) for field in fields(k_mask)]
                scores = jnp.where(seen(fields(q_mask), spread), scores, UNSEEN)
            weights = jnp.exp(scores - stats[:1, :])
            dv[part, :] += dot(weights.astype(dout.dtype), dout[...], 1, 0)
            dscores = weights * (dot(v[part, :], dout[...], 1, 1) - stats[1:2, :]) * slope
            dk[part, :] += dot(dscores.astype(q.dtype), q[...], 1, 0)

    pl.when(code == WHOLE)(partial(absorb, masked=False))
    pl.when(code == MASKED)(partial(absorb, masked=True))

    @pl.when((group == pl.num_programs(3) - 1) & (step == pl.num_programs(4) - 1))
    def _() -> None:
        dk[...] = dk[...] * logits.scale


class Saved(NamedTuple):
    """The query side of the backward pass, made once for all hops."""

    prepared: plan.Prepared
    dout: jax.Array  # [B, H, Cp, Dp]
    stats: jax.Array  # [B, H, 2, Cp] float32: lse, delta


def save(prepared: plan.Prepared, dout: jax.Array, lse: jax.Array, delta: jax.Array) -> Saved:
    """Lay out ``dout [B,C,H,D]``, ``lse`` and ``delta [B,C,H]``; lse is infinite where a query sees nothing."""
    q = prepared.q
    stats = jnp.stack([jnp.where(jnp.isinf(lse), _NEVER, lse), delta], axis=-1).astype(jnp.float32)
    return Saved(
        prepared,
        plan.heads_first(dout.astype(q.dtype), q.shape[2], q.shape[3]),
        jnp.swapaxes(plan.heads_first(stats, q.shape[2], 2), 2, 3),
    )


class _Call(NamedTuple):
    """What both kernels are given: heads first, padded to whole blocks."""

    q: jax.Array  # [B, H, Cp, Dp]
    k: jax.Array  # [B, K, Tp, Dp]
    v: jax.Array  # [B, K, Tp, Dp]
    dout: jax.Array  # [B, H, Cp, Dp]
    stats: jax.Array  # [B, H, 2, Cp]
    q_rows: jax.Array  # [R, 2 or 3, Cp]
    k_rows: jax.Array  # [1 or B, 1 or 2, Tp]

    def specs(self, cut: plan.Cut, at_query, at_key) -> list[pl.BlockSpec]:  # type: ignore[no-untyped-def]
        """Blocks of all arrays, from functions of the grid to (batch, head, block)."""
        row_blocks = (self.q_rows.shape[0] > 1, self.k_rows.shape[0] > 1)

        def tokens(at):  # type: ignore[no-untyped-def]
            return lambda *grid: (*at(*grid), 0)

        def stats(*grid):  # type: ignore[no-untyped-def]
            b, h, i = at_query(*grid)
            return b, h, 0, i

        def mask(at, by_row):  # type: ignore[no-untyped-def]
            def index(*grid):  # type: ignore[no-untyped-def]
                b, _, i = at(*grid)
                return b if by_row else 0, 0, i

            return index

        queries = pl.BlockSpec((None, None, cut.block_q, cut.dim), tokens(at_query))
        keys = pl.BlockSpec((None, None, cut.block_k, cut.dim), tokens(at_key))
        return [
            queries, keys, keys, queries,
            pl.BlockSpec((None, None, 2, cut.block_q), stats),
            pl.BlockSpec((None, self.q_rows.shape[1], cut.block_q), mask(at_query, row_blocks[0])),
            pl.BlockSpec((None, self.k_rows.shape[1], cut.block_k), mask(at_key, row_blocks[1])),
        ]  # fmt: skip


def _dq(dq: jax.Array, call: _Call, codes: jax.Array, cut: plan.Cut, logits: Logits, interpret: Any) -> jax.Array:
    """``dq [B, H, Cp, Dp]`` float32 with this hop's share added, written over the old one."""
    visits, walk, steps = plan.visits(codes)

    def at_query(b, h, i, j, *_):  # type: ignore[no-untyped-def]
        return b, h, i

    def at_key(b, h, i, j, *refs):  # type: ignore[no-untyped-def]
        return b, cut.kv_head(h), walk.block(plan.Visits(*refs), b, i, j)

    column_shape = pltpu.VMEM((cut.block_q, plan.LANES), jnp.float32)
    specs = call.specs(cut, at_query, at_key)
    return pl.pallas_call(
        partial(_dq_kernel, walk=walk, logits=logits),
        name="attention_block_dq",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(cut.batch, cut.heads, cut.count_q, steps),
            in_specs=[*specs, specs[0]],
            out_specs=specs[0],
            scratch_shapes=[column_shape, column_shape],
        ),
        out_shape=jax.ShapeDtypeStruct(dq.shape, dq.dtype),
        input_output_aliases={3 + len(specs): 0},
        compiler_params=plan.parallel(3, 1),
        cost_estimate=cut.estimate(3, *call, dq, dq),
        interpret=interpret,
    )(*visits, *call, dq)


def _dkv(call: _Call, codes: jax.Array, cut: plan.Cut, logits: Logits, interpret: Any) -> tuple[jax.Array, jax.Array]:
    """Twice ``[B, K, Tp, Dp]`` float32."""
    visits, walk, steps = plan.visits(jnp.swapaxes(codes, 1, 2))

    def at_query(b, h, j, g, i, *refs):  # type: ignore[no-untyped-def]
        return b, h * cut.groups + g, walk.block(plan.Visits(*refs), b, j, i)

    def at_key(b, h, j, g, i, *_):  # type: ignore[no-untyped-def]
        return b, h, j

    shape = jax.ShapeDtypeStruct(call.k.shape, jnp.float32)
    specs = call.specs(cut, at_query, at_key)
    dk, dv = pl.pallas_call(
        partial(_dkv_kernel, walk=walk, logits=logits),
        name="attention_block_dkv",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(cut.batch, cut.kv_heads, cut.count_k, cut.groups, steps),
            in_specs=specs,
            out_specs=[specs[1], specs[1]],
        ),
        out_shape=(shape, shape),
        compiler_params=plan.parallel(3, 2),
        cost_estimate=cut.estimate(4, *call, shape, shape),
        interpret=interpret,
    )(*visits, *call)
    return dk, dv


def start(saved: Saved) -> jax.Array:
    """dq before any key, ``[B, H, Cp, Dp]`` float32."""
    return jnp.zeros(saved.dout.shape, jnp.float32)


def absorb(
    dq: jax.Array,
    saved: Saved,
    k: jax.Array,
    v: jax.Array,
    keys: Keys,
    logits: Logits,
    block_q: int | None,
    block_k: int | None,
    interpret: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq with the share of ``k, v [B,T,K,D]`` added, and their own dk and dv ``[B,T,K,D]``, all float32."""
    prepared, cut = saved.prepared, plan.cut(saved.prepared, k, v, keys, block_q, block_k)
    split_k, split_v = (plan.heads_first(x, cut.padded_keys, cut.dim) for x in (k, v))
    call = _Call(prepared.q, split_k, split_v, saved.dout, saved.stats, prepared.rows, plan.key_rows(keys, cut))
    codes = plan.classify(call.q_rows, call.k_rows, cut)
    dq = _dq(dq, call, codes, cut, logits, interpret)
    dk, dv = (plan.tokens_first(x, cut.keys, k.shape[3]) for x in _dkv(call, codes, cut, logits, interpret))
    return dq, dk, dv


def finish(dq: jax.Array, length: int, dim: int, logits: Logits) -> jax.Array:
    """dq ``[B,C,H,D]`` float32."""
    return plan.tokens_first(dq, length, dim) * logits.scale
