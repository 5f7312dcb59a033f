"""One hop forward: what a rank's queries get from one rank's keys, by online softmax (arXiv 2112.05682, 2205.14135).

Out, row maximum and denominator go from hop to hop as they are, and are divided once, after the last: a merge by lse
would lose what float32 cannot hold of a large lse, and would run after the kernel instead of in it.

The grid walks batch, query heads, blocks of queries and, innermost, the blocks of keys that a block of queries visits.
Scores are ``[queries, keys]``; row maximum and denominator are kept as columns, the denominator a share in each lane.

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
from lwm_jax_ring.attention.kernels.pallas_tpu.inside import (
    LOG2E,
    LOWEST,
    UNSEEN,
    Logits,
    across,
    column,
    dot,
    fields,
    parts,
    row,
    seen,
)
from lwm_jax_ring.attention.kernels.xla import MASKED, WHOLE

PART_K = 512


class State(NamedTuple):
    """Running softmax of all queries between two hops, float32, in the kernel's own layout."""

    out: jax.Array  # [B, H, Cp, Dp] numerator
    top: jax.Array  # [B, H, 1, Cp] row maximum, in units of Logits.unit
    total: jax.Array  # [B, H, 1, Cp] denominator


def _kernel(
    words, first, last, q, k, v, q_mask, k_mask, out_in, top_in, total_in, out, top_out, total_out, top, total,
    *, walk: plan.Walk, logits: Logits,
) -> None:  # type: ignore[no-untyped-def]  # fmt: skip
    batch, block, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    code = walk.code(plan.Visits(words, first, last), batch, block, step)

    @pl.when(step == 0)
    def _() -> None:
        out[...] = out_in[...]
        top[...], total[...] = column(top_in[...]), column(total_in[...] * (1.0 / plan.LANES))

    def absorb(masked: bool) -> None:
        of_queries = [column(field) for field in fields(q_mask)] if masked else []
        for part in parts(k.shape[0], PART_K):
            scores = logits.unscaled(dot(q[...], k[part, :], 1, 1))
            if masked:
                spread = [across(field, scores.shape[1]) for field in of_queries]
                scores = jnp.where(seen(spread, [field[:, part] for field in fields(k_mask)]), scores, UNSEEN)
            old_top = top[...]
            new_top = jnp.maximum(old_top, scores.max(axis=1, keepdims=True))
            weights = jnp.exp2((scores - across(new_top, scores.shape[1])) * (logits.unit * LOG2E))
            fade = jnp.exp2((old_top - new_top) * (logits.unit * LOG2E))
            lanes = sum(weights[:, i : i + plan.LANES] for i in range(0, weights.shape[1], plan.LANES))
            top[...], total[...] = new_top, total[...] * fade + lanes
            out[...] = out[...] * across(fade, out.shape[1]) + dot(weights.astype(v.dtype), v[part, :], 1, 0)

    pl.when(code == WHOLE)(partial(absorb, masked=False))
    pl.when(code == MASKED)(partial(absorb, masked=True))

    @pl.when(step == pl.num_programs(3) - 1)
    def _() -> None:
        whole = jnp.broadcast_to(total[...].sum(axis=1, keepdims=True), total.shape)
        top_out[...], total_out[...] = row(top[...]), row(whole)


def start(prepared: plan.Prepared) -> State:
    """The state before any key."""
    batch, heads, length, dim = prepared.q.shape
    rows = (batch, heads, 1, length)
    return State(
        jnp.zeros((batch, heads, length, dim), jnp.float32), jnp.full(rows, LOWEST, jnp.float32), jnp.zeros(rows)
    )


def absorb(
    state: State,
    prepared: plan.Prepared,
    k: jax.Array,
    v: jax.Array,
    keys: Keys,
    logits: Logits,
    block_q: int | None,
    block_k: int | None,
    interpret: Any,
) -> State:
    """The state after the queries have seen ``k, v [B,T,K,D]``; it is written over the old one."""
    cut = plan.cut(prepared, k, v, keys, block_q, block_k)
    q_rows, k_rows = prepared.rows, plan.key_rows(keys, cut)
    visits, walk, steps = plan.visits(plan.classify(q_rows, k_rows, cut))
    split_k, split_v = (plan.heads_first(x, cut.padded_keys, cut.dim) for x in (k, v))

    def at_query(b, h, i, j, *_):  # type: ignore[no-untyped-def]
        return b, h, i, 0

    def at_row(b, h, i, j, *_):  # type: ignore[no-untyped-def]
        return b, h, 0, i

    def at_key(b, h, i, j, *refs):  # type: ignore[no-untyped-def]
        return b, cut.kv_head(h), walk.block(plan.Visits(*refs), b, i, j), 0

    def at_query_mask(b, h, i, j, *_):  # type: ignore[no-untyped-def]
        return b if cut.mask_rows > 1 else 0, 0, i

    def at_key_mask(b, h, i, j, *refs):  # type: ignore[no-untyped-def]
        return b if k_rows.shape[0] > 1 else 0, 0, walk.block(plan.Visits(*refs), b, i, j)

    queries = pl.BlockSpec((None, None, cut.block_q, cut.dim), at_query)
    of_keys = pl.BlockSpec((None, None, cut.block_k, cut.dim), at_key)
    rows = pl.BlockSpec((None, None, 1, cut.block_q), at_row)
    column_shape = pltpu.VMEM((cut.block_q, plan.LANES), jnp.float32)
    result = pl.pallas_call(
        partial(_kernel, walk=walk, logits=logits),
        name="attention_block_forward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(cut.batch, cut.heads, cut.count_q, steps),
            in_specs=[
                queries, of_keys, of_keys,
                pl.BlockSpec((None, q_rows.shape[1], cut.block_q), at_query_mask),
                pl.BlockSpec((None, k_rows.shape[1], cut.block_k), at_key_mask),
                queries, rows, rows,
            ],
            out_specs=[queries, rows, rows],
            scratch_shapes=[column_shape, column_shape],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in state],
        input_output_aliases={8: 0, 9: 1, 10: 2},
        compiler_params=plan.parallel(3, 1),
        cost_estimate=cut.estimate(2, prepared.q, k, v, *state, *state),
        interpret=interpret,
    )(*visits, prepared.q, split_k, split_v, q_rows, k_rows, *state)  # fmt: skip
    return State(*result)


def finish(state: State, length: int, dim: int, logits: Logits) -> tuple[jax.Array, jax.Array]:
    """out ``[B,C,H,D]`` and natural-log lse ``[B,C,H]``, float32: 0 and −inf where nothing was seen."""
    out, top, total = (jnp.swapaxes(x, 1, 2) for x in (state.out, state.top[:, :, 0], state.total[:, :, 0]))
    out, top, total = out[:, :length, :, :dim], top[:, :length], total[:, :length]
    something = total > 0
    divisor = jnp.where(something, total, 1.0)
    return out / divisor[..., None], jnp.where(something, top * logits.unit + jnp.log(divisor), -jnp.inf)
