"""The Pallas TPU kernel: its numbers in interpret mode against float64, and that real TPUs' compiler takes it.

Shapes: B batch, S tokens of the whole row, C queries and T keys of a hop, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lwm_core.attention import AttentionMask, mask_bounds
from lwm_core.errors import ShapeError, UnsupportedError
from lwm_core.layout import SequenceLayout
from lwm_core.reference import attention_backward, attention_forward
from lwm_core.testing import assert_close, assert_no_worse
from lwm_jax_ring.attention.blocks import Keys, Queries
from lwm_jax_ring.attention.kernels import pallas_tpu, xla
from lwm_jax_ring.attention.kernels.pallas_tpu import plan

Array = NDArray[np.float32]
TOLERANCE = 1e-5


class Row(NamedTuple):
    """One whole row of tokens in natural order."""

    q: Array
    k: Array
    v: Array
    dout: Array
    mask: AttentionMask
    segments: NDArray[np.int32] | None

    def queries(self, index: NDArray[np.integer]) -> Queries:
        low, high = (
            bound.reshape(-1, self.q.shape[1]) for bound in mask_bounds(self.mask, self.q.shape[1], self.segments)
        )
        segments = None if self.segments is None else jnp.asarray(self.segments[:, index])
        return Queries(jnp.asarray(low[:, index]), jnp.asarray(high[:, index]), segments)

    def keys(self, index: NDArray[np.integer]) -> Keys:
        segments = None if self.segments is None else jnp.asarray(self.segments[:, index])
        return Keys(jnp.asarray(index, jnp.int32), segments)


def make_row(
    mask: AttentionMask,
    length: int,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 64,
    segments: list[int] | None = None,
) -> Row:
    """Random arrays of two rows; ``segments`` are document lengths, the first row's turned round in the second."""
    random = np.random.default_rng(length + heads)
    shapes = [(2, length, n, dim) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, dout = (random.standard_normal(shape).astype(np.float32) for shape in shapes)
    ids = None
    if segments is not None:
        rows = [np.repeat(np.arange(1, len(part) + 1), part) for part in (segments, segments[::-1])]
        ids = np.stack([np.pad(row, (0, length - row.size)) for row in rows]).astype(np.int32)
    return Row(q, k, v, dout, mask, ids)


def make_kernel(dim: int, scale: float | None = None, softcap: float | None = None) -> pallas_tpu.PallasTpuKernel:
    """Small blocks, in interpret mode."""
    return pallas_tpu.PallasTpuKernel(scale or dim**-0.5, dim, softcap, block_q=128, block_k=128, interpret=True)


@partial(jax.jit, static_argnums=(0, 1, 2))
def run(kernel: Any, method: str, numbers: tuple[int, ...], *arrays: Any) -> Any:
    """A kernel's method, compiled once for each shape; masks are data."""
    return getattr(kernel, method)(*arrays, *numbers)


def play(row: Row, hops: list[NDArray[np.integer]], index: NDArray[np.integer], dtype: str = "float32"):  # type: ignore[no-untyped-def]
    """Queries at ``index`` see the keys of one hop after the other, as in a ring.

    Returns:
        out, lse, dq, of the queries; dk, dv of all keys in natural order.
    """
    length, (kv_heads, dim) = index.size, row.k.shape[2:]
    kernel = make_kernel(dim)
    q, dout = (jnp.asarray(x[:, index], dtype) for x in (row.q, row.dout))
    k, v = (jnp.asarray(x, dtype) for x in (row.k, row.v))
    mask = row.queries(index)
    queries = run(kernel, "queries", (kv_heads,), q, mask)
    state = run(kernel, "start", (), queries)
    for hop in hops:
        state = run(kernel, "absorb", (), state, queries, k[:, hop], v[:, hop], row.keys(hop))
    out, lse = run(kernel, "finish", (length,), state)
    saved = run(kernel, "saved", (kv_heads,), q, out, dout, lse, mask)
    sums, dk, dv = (
        run(kernel, "start_gradient", (), saved),
        np.zeros(k.shape, np.float32),
        np.zeros(k.shape, np.float32),
    )
    for hop in hops:
        sums, *more = run(kernel, "gradients", (), sums, saved, k[:, hop], v[:, hop], row.keys(hop))
        dk[:, hop] += np.asarray(more[0])
        dv[:, hop] += np.asarray(more[1])
    result = out, lse, run(kernel, "finish_gradient", (length,), sums), *more
    assert all(x.dtype == jnp.float32 for x in result)
    return tuple(np.asarray(x) for x in (*result[:3], dk, dv))


def oracle(row: Row, dtype: str = "float32"):  # type: ignore[no-untyped-def]
    """The same in float64, of arrays rounded to ``dtype``."""
    q, k, v, dout = (np.asarray(jnp.asarray(x, dtype)) for x in row[:4])
    out, lse = attention_forward(q, k, v, row.mask, row.segments)
    return out, lse, *attention_backward(q, k, v, row.mask, dout, row.segments)


NAMES = ("out", "lse", "dq", "dk", "dv")
CAUSAL, FULL = AttentionMask("causal"), AttentionMask("full")
ROWS = {  # few shapes, since the mask is data and a shape is compiled once
    "causal": lambda: make_row(CAUSAL, 300),
    "window": lambda: make_row(AttentionMask("causal", window=40), 300),
    "full": lambda: make_row(FULL, 300),
    "block-causal": lambda: make_row(AttentionMask("block_causal", window=96, block=48), 300),
    "documents": lambda: make_row(CAUSAL, 300, segments=[130, 1, 126, 23]),
    "documents-block-causal": lambda: make_row(AttentionMask("block_causal", block=32), 300, segments=[50, 70, 150]),
    "documents-full": lambda: make_row(FULL, 300, segments=[128, 64, 32]),
    "padding-only": lambda: make_row(CAUSAL, 300, segments=[]),
    "one-key-head-of-odd-dim": lambda: make_row(CAUSAL, 128, heads=3, kv_heads=1, dim=80),
}


@pytest.mark.parametrize("name", ROWS)
def test_one_hop_equals_the_oracle(name: str) -> None:
    """Out, lse and all gradients of a whole row; queries outside documents give 0, −inf and no gradient."""
    row = ROWS[name]()
    everything = np.arange(row.q.shape[1])
    for what, got, expected in zip(NAMES, play(row, [everything], everything), oracle(row), strict=True):
        assert_close(got, expected, TOLERANCE, f"{name}: {what}")
        if row.segments is not None:
            assert np.all(got[row.segments == 0] == (-np.inf if what == "lse" else 0.0)), what


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "striped"])
def test_merged_hops_equal_the_oracle(kind: str) -> None:
    """A ring of two, played through: documents cross ranks, some hops are empty, dK and dV add up over ranks."""
    row = make_row(CAUSAL, 512, segments=[200, 40, 250])
    layout = SequenceLayout(kind, 2)
    ranks = [layout.rank_indices(512, rank) for rank in range(2)]
    expected = dict(zip(NAMES, oracle(row), strict=True))
    sums = {"dk": np.zeros_like(row.k), "dv": np.zeros_like(row.v)}
    for rank, index in enumerate(ranks):
        got = dict(zip(NAMES, play(row, [ranks[rank], ranks[1 - rank]], index), strict=True))
        for what in ("out", "lse", "dq"):
            assert_close(got[what], expected[what][:, index], TOLERANCE, f"{kind}, rank {rank}: {what}")
        for what in sums:
            sums[what] += got[what]
    for what, total in sums.items():
        assert_close(total, expected[what], TOLERANCE, f"{kind}: {what}")


def test_hops_of_their_own_merge_by_lse() -> None:
    """``forward`` of each half of the keys, merged, is the whole; some rows see only one half."""
    row = make_row(CAUSAL, 256)
    call = jax.jit(partial(pallas_tpu.forward, scale=0.125, block_q=128, block_k=128, interpret=True))
    queries = row.queries(np.arange(256))
    halves = [np.arange(128), np.arange(128, 256)]
    parts = [call(row.q, row.k[:, half], row.v[:, half], queries, row.keys(half)) for half in halves]
    assert np.all(np.isneginf(parts[1][1][:, :128])) and not np.any(parts[1][0][:, :128])
    (out, lse), (more_out, more_lse) = ([np.asarray(x, np.float64) for x in part] for part in parts)
    total = np.logaddexp(lse, more_lse)
    merged = np.exp(lse - total)[..., None] * out + np.exp(more_lse - total)[..., None] * more_out
    for what, got, expected in zip(NAMES, (merged, total), oracle(row), strict=False):
        assert_close(got, expected, TOLERANCE, what)


def plain(q, k, v, dout, seen, scale, softcap):  # type: ignore[no-untyped-def]
    """Float64 attention of C queries over T keys with ``seen [B, C, T]`` and a softcap; gradients by the chain rule."""
    q, k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
    groups = q.shape[2] // k.shape[2]
    k_all, v_all = (np.repeat(x, groups, axis=2) for x in (k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k_all) * scale
    slope = np.ones_like(scores)
    if softcap is not None:
        slope = 1 - np.tanh(scores / softcap) ** 2
        scores = softcap * np.tanh(scores / softcap)
    weights = np.where(seen[:, None], np.exp(scores), 0.0)
    total = weights.sum(-1, keepdims=True)
    p = weights / np.where(total > 0, total, 1.0)
    with np.errstate(divide="ignore"):
        lse = np.log(total[..., 0]).transpose(0, 2, 1)
    dp = np.einsum("bqhd,bkhd->bhqk", dout, v_all)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * slope * scale
    dk, dv = np.einsum("bhqk,bqhd->bkhd", ds, q), np.einsum("bhqk,bqhd->bkhd", p, dout)
    dk, dv = (x.reshape(*k.shape[:3], groups, -1).sum(3) for x in (dk, dv))
    return np.einsum("bhqk,bkhd->bqhd", p, v_all), lse, np.einsum("bhqk,bkhd->bqhd", ds, k_all), dk, dv


@pytest.mark.parametrize(("count", "key_count", "softcap"), [(130, 300, None), (260, 70, 5.0)])
def test_queries_and_keys_of_unequal_number(count: int, key_count: int, softcap: float | None) -> None:
    """Neither number is a multiple of a block; some keys are nobody's (index −1) and some queries see no key at all."""
    random = np.random.default_rng(count)
    q, dout = (random.standard_normal((2, count, 4, 64)).astype(np.float32) for _ in range(2))
    k, v = (random.standard_normal((2, key_count, 2, 64)).astype(np.float32) for _ in range(2))
    index = np.where(random.random(key_count) < 0.1, -1, random.permutation(key_count)).astype(np.int32)
    low = random.integers(0, key_count, (2, count)).astype(np.int32)
    high = low + random.integers(-20, 60, (2, count)).astype(np.int32)
    seen = (low[..., None] <= index) & (index <= high[..., None]) & (index >= 0)
    assert not seen.any(-1).all(), "some query should see nothing"
    masks = Queries(jnp.asarray(low), jnp.asarray(high), None), Keys(jnp.asarray(index), None)
    options = {"scale": 0.125, "softcap": softcap, "block_q": 128, "block_k": 128, "interpret": True}
    out, lse = jax.jit(partial(pallas_tpu.forward, **options))(q, k, v, *masks)
    backward = jax.jit(partial(pallas_tpu.backward, **options))
    got = (out, lse, *backward(q, k, v, out, dout, lse, *masks))
    for what, mine, expected in zip(NAMES, got, plain(q, k, v, dout, seen, 0.125, softcap), strict=True):
        assert_close(mine, expected, TOLERANCE, what)


@partial(jax.jit, static_argnums=6)
def xla_hop(q, k, v, dout, queries, keys, scale):  # type: ignore[no-untyped-def]
    """One whole row by the XLA block kernel, its float32 accumulators unrounded."""
    kernel, length, kv_heads = xla.XlaKernel(scale, 128, 128), q.shape[1], k.shape[2]
    prepared = kernel.queries(q, queries, kv_heads)
    out, lse = kernel.finish(kernel.absorb(kernel.start(prepared), prepared, k, v, keys), length)
    saved = kernel.saved(q, out, dout, jnp.where(jnp.isneginf(lse), jnp.inf, lse), queries, kv_heads)
    dq, dk, dv = kernel.gradients(kernel.start_gradient(saved), saved, k, v, keys)
    return out, lse, kernel.finish_gradient(dq, length), dk, dv


def test_bfloat16_errs_no_more_than_the_xla_kernel() -> None:
    """In one hop and merged from two, against the float64 oracle of the rounded inputs."""
    row = make_row(CAUSAL, 512, dim=128, segments=[300, 200])
    everything = np.arange(512)
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in row[:4]]
    single = xla_hop(*narrow, row.queries(everything), row.keys(everything), row.q.shape[-1] ** -0.5)
    expected = oracle(row, "bfloat16")
    for hops in ([everything], [everything[:256], everything[256:]]):
        got = play(row, hops, everything, "bfloat16")
        for what, mine, exact, other in zip(NAMES, got, expected, single, strict=True):
            if what == "lse":
                assert_close(mine, exact, TOLERANCE, what)
            else:
                assert_no_worse(mine, exact, other, f"{len(hops)} hops: {what}")


@pytest.mark.parametrize("sign", [1, -1])
def test_logits_near_ten_thousand(sign: int) -> None:
    """All logits ±1e4 and apart by ones: weights that are not one-hot come out right from two hops."""
    row = make_row(CAUSAL, 300)
    random = np.random.default_rng(5)
    q, k = np.zeros_like(row.q), np.zeros_like(row.k)
    q[..., 0], q[..., 1] = 800.0, 8.0  # the scale is 1/8: 100 · 100 + 1 · j
    k[..., 0], k[..., 1] = 100.0 * sign, random.integers(-4, 5, k.shape[:3])
    row = row._replace(q=q, k=k)
    everything = np.arange(300)
    arrays = [jnp.asarray(x) for x in row[:4]]
    single = xla_hop(*arrays, row.queries(everything), row.keys(everything), 0.125)
    hops = [everything[:150], everything[150:]]
    for what, mine, exact, other in zip(NAMES, play(row, hops, everything), oracle(row), single, strict=True):
        if what in ("out", "lse"):
            assert_close(mine, exact, TOLERANCE, what)
        else:  # the gradients pass through an lse of 1e4, which float32 holds to 5e-4
            assert_no_worse(mine, exact, other, what)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dominant_key_on_the_last_hop(dtype: str) -> None:
    """Every query's one logit of +1e4 comes after a hop of nothing but −1e4: it wins whole, and nothing overflows."""
    row = make_row(FULL, 512)
    row.q[:], row.k[:] = 0.0, 0.0
    row.q[..., 0], row.k[..., 0], row.k[:, 400, :, 0] = 800.0, -100.0, 100.0
    everything = np.arange(512)
    out, lse, dq, dk, dv = play(row, [everything[:256], everything[256:]], everything, dtype)
    v, dout = (np.asarray(jnp.asarray(x, dtype), np.float64) for x in (row.v, row.dout))
    assert_close(out, np.broadcast_to(np.repeat(v[:, 400:401], 2, axis=2), out.shape), 1e-6, "out")
    assert np.all(lse == 1e4)
    expected = np.zeros_like(v)
    expected[:, 400] = dout.reshape(2, 512, 2, 2, 64).sum((1, 3))
    assert_close(dv, expected, TOLERANCE, "dv")
    assert np.abs(dq).max() < 2e-3 and np.abs(dk).max() < 0.5, "rounding of dout · v − delta, times k or 512 · 800"


small = st.integers(0, 40)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), documents=st.booleans())
def test_no_pair_of_blocks_is_skipped_or_called_whole_wrongly(data: st.DataObject, documents: bool) -> None:
    """SKIP means that nothing is seen, WHOLE that everything is; nothing is computed that the XLA kernel would skip."""
    block, count, key_count = 4, 10, 14
    draw = lambda n, values: np.array(data.draw(st.lists(values, min_size=n, max_size=n)), np.int32)  # noqa: E731
    base = np.sort(draw(count, small)) if data.draw(st.booleans()) else draw(count, small)
    low, high = base[None] - data.draw(small), base[None] + data.draw(st.integers(-3, 40))
    index = np.sort(draw(key_count, st.integers(-1, 40))) if data.draw(st.booleans()) else draw(key_count, small)
    ids = st.integers(0, 3)
    q_ids = np.sort(draw(2 * count, ids)).reshape(2, count) if documents else None
    k_ids = np.sort(draw(2 * key_count, ids)).reshape(2, key_count) if documents else None
    rows = 2 if documents else 1
    cut = plan.Cut(2, 1, 1, 12, key_count, 64, block, block, rows)
    queries = Queries(
        *(None if x is None else jnp.asarray(x) for x in (low.astype(np.int32), high.astype(np.int32), q_ids))
    )
    keys = Keys(*(None if x is None else jnp.asarray(x) for x in (index, k_ids)))
    codes = np.asarray(plan.classify(plan.query_rows(queries, 2, 12), plan.key_rows(keys, cut), cut))
    assert codes.shape == (rows, 3, 4)
    seen = np.zeros((rows, 12, 16), bool)
    seen[:, :count, :key_count] = (low[..., None] <= index) & (index <= high[..., None]) & (index >= 0)
    if documents:
        seen[:, :count, :key_count] &= (q_ids[..., None] == k_ids[:, None]) & (q_ids[..., None] != 0)
    blocks = seen.reshape(rows, 3, block, 4, block)
    assert not blocks.any((2, 4))[codes == xla.SKIP].any()
    assert blocks.all((2, 4))[codes == xla.WHOLE].all()
    of_xla = jax.vmap(lambda a: jax.vmap(lambda b: xla.classify(a, b))(xla.split_key_mask(keys, block)))
    theirs = np.asarray(of_xla(xla.split_query_mask(queries, block)))
    assert np.all((codes.max(0) != xla.SKIP) <= (theirs != xla.SKIP)), "computes what the XLA kernel skips"
    assert np.all((codes == xla.WHOLE).all(0) >= (theirs == xla.WHOLE)), "masks what the XLA kernel does not"


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), shape=st.sampled_from([(1, 1, 1), (2, 5, 16), (2, 4, 37)]))
def test_a_walk_does_every_live_block_once_and_fetches_nothing_in_vain(seed: int, shape: tuple[int, int, int]) -> None:
    """What the kernel does step by step is what the codes say; the block under it changes only inside a live run."""
    rows, outer, inner = shape
    random = np.random.default_rng(seed)
    codes = random.integers(0, 3, (rows, outer, inner)) * (random.random((rows, outer, inner)) < random.random())
    codes[random.random((rows, outer)) < 0.3] = 0
    flat, walk, steps = plan.visits(jnp.asarray(codes, jnp.int32))
    row, block, step = (jnp.asarray(x, jnp.int32) for x in np.indices(shape))
    at, done = (np.asarray(read(flat, row, block, step))[..., : int(steps)] for read in (walk.block, walk.code))
    for r in range(rows):
        standing = None
        for o in range(outer):
            live = np.flatnonzero(codes[r, o])
            visited = {int(b): int(c) for b, c in zip(at[r, o], done[r, o], strict=True) if c}
            assert visited == {int(b): int(codes[r, o, b]) for b in live}
            assert (done[r, o] != 0).sum() == live.size
            if live.size:
                assert set(at[r, o]) <= set(range(live[0], live[-1] + 1))
                standing = at[r, o, -1]
            elif standing is not None:
                assert set(at[r, o]) == {standing}


def test_what_is_not_supported_is_refused() -> None:
    q, k = jnp.zeros((1, 128, 3, 64)), jnp.zeros((1, 128, 2, 64))
    index = jnp.arange(128, dtype=jnp.int32)
    queries, keys = Queries(index[None] * 0, index[None], None), Keys(index, None)
    call = partial(pallas_tpu.forward, queries=queries, keys=keys, scale=1.0)
    with pytest.raises(ShapeError, match="3 query heads over 2"):
        call(q, k, k)
    with pytest.raises(UnsupportedError, match="float16"):
        call(*[x.astype(jnp.float16) for x in (k, k, k)])
    with pytest.raises(UnsupportedError, match="head dim 300"):
        call(*[jnp.zeros((1, 128, 1, 300))] * 3)
    with pytest.raises(ShapeError, match="block_k is 100"):
        call(k, k, k, block_k=100)
    with pytest.raises(ShapeError, match="scale is -1"):
        call(k, k, k, scale=-1.0)
    with pytest.raises(ShapeError, match="one side only"):
        call(k, k, k, keys=Keys(index, index[None]))
    with pytest.raises(ShapeError, match="lse"):
        pallas_tpu.backward(k, k, k, k, k, k[..., :1, 0], queries, keys, scale=1.0)
    with pytest.raises(UnsupportedError, match="scalar memory"):
        jax.eval_shape(plan.visits, jax.ShapeDtypeStruct((4, 2048, 2048), jnp.int32))
