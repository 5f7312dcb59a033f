"""What the conformance kit leaves to a backend: its merge, its indices, and its program's structure."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lwm_core.attention import AttentionMask, executed_blocks
from lwm_core.attention_cost import AttentionShape, MachineRates, strategy_cost
from lwm_core.errors import UnsupportedError
from lwm_core.layout import LAYOUTS, SequenceLayout
from lwm_core.reference import attention_forward
from lwm_core.testing import relative_l2
from lwm_jax_ring.attention.blocks import Keys, Queries, natural_indices, to_natural
from lwm_jax_ring.attention.kernels import xla
from lwm_jax_ring.attention.kernels.pallas_tpu import plan
from lwm_jax_ring.attention.options import AttentionOptions
from lwm_jax_ring.attention.ring import RING
from lwm_jax_ring.attention.spec import AttentionSpec
from lwm_jax_ring.attention.strategies import STRATEGIES, attention_spec

CAUSAL = AttentionMask("causal")


def ring(world: int) -> Mesh:
    """``world`` devices of this process."""
    return Mesh(np.array(jax.devices()[:world]), ("sp",))


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_traced_indices_equal_the_cores(kind: str, world: int) -> None:
    """The indices that a program works out from its rank are the layout's, and going back to natural order is right."""
    layout = SequenceLayout(kind, world)
    length = layout.multiple * 5
    for rank in range(world):
        np.testing.assert_array_equal(natural_indices(layout, length, rank), layout.rank_indices(length, rank))
    np.testing.assert_array_equal(to_natural(jnp.asarray(layout.permutation(length)), layout), np.arange(length))


run = jax.jit(lambda kernel, method, *arguments: getattr(kernel, method)(*arguments), static_argnums=(0, 1))


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(4)), hidden=st.sets(st.integers(0, 3)), seed=st.integers(0, 1000))
def test_blocks_merge_in_any_order(order: list[int], hidden: set[int], seed: int) -> None:
    """Keys may come in any order and whole blocks of them may be invisible; nothing visible gives 0 and −inf."""
    random = np.random.default_rng(seed)
    q, k, v = (random.standard_normal((1, 8, 2, 4)).astype(np.float32) for _ in range(3))
    index = np.arange(8)
    segments = np.where(np.isin(index // 2, list(hidden)), 0, 1).astype(np.int32)[None]
    everyone = jnp.ones((1, 8), jnp.int32)
    queries = Queries(jnp.zeros((1, 8), jnp.int32), jnp.full((1, 8), 7, jnp.int32), everyone)
    kernel = xla.XlaKernel(scale=0.5, query_chunk=4, key_chunk=2)
    prepared = kernel.queries(jnp.asarray(q), queries, 2)
    state = run(kernel, "start", prepared)
    for block in order:
        part = slice(2 * block, 2 * block + 2)
        keys = Keys(jnp.asarray(index[part], jnp.int32), jnp.asarray(segments[:, part]))
        state = run(kernel, "absorb", state, prepared, jnp.asarray(k[:, part]), jnp.asarray(v[:, part]), keys)
    out, lse = kernel.finish(state, 8)
    seen = np.flatnonzero(segments[0])
    if seen.size == 0:
        assert not np.any(out) and np.all(np.isneginf(lse))
        return
    scores = np.einsum("qhd,khd->hqk", q[0], k[0][seen]).astype(np.float64) * 0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v[0][seen])
    expected_lse = np.log(np.exp(scores).sum(-1)).T
    assert relative_l2(np.asarray(out[0]), expected) < 1e-6
    assert relative_l2(np.asarray(lse[0]), expected_lse) < 1e-6


@pytest.mark.parametrize("length", [37, 101])
def test_lengths_that_no_chunk_divides_are_padded_inside(length: int) -> None:
    """A prime length is cut into padded chunks, and the padding is seen by nobody."""
    random = np.random.default_rng(1)
    q, k, v = (random.standard_normal((2, length, 2, 8)).astype(np.float32) for _ in range(3))
    for mask in (AttentionMask("causal"), AttentionMask("full"), AttentionMask("causal", window=5)):
        spec = attention_spec(AttentionOptions(query_chunk=16, key_chunk=32), ring(1), "sp", length, mask, 8)
        out = RING.attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), None, spec)
        assert relative_l2(np.asarray(out), attention_forward(q, k, v, mask)[0]) < 1e-6


def _loss(world: int, length: int, dtype: str, mask: AttentionMask, **options: Any) -> tuple[Any, tuple[Any, ...]]:
    """A scalar of attention over ``world`` devices, and the shapes of its arguments: q, k, v, segment ids."""
    mesh = ring(world)
    chosen = AttentionOptions(query_chunk=32, key_chunk=32, **options)
    spec = attention_spec(chosen, mesh, "sp", length, mask, 16)

    def loss(q, k, v, segments):  # type: ignore[no-untyped-def]
        local = jax.shard_map(
            lambda a, b, c, s: STRATEGIES[chosen.strategy].attention(a, b, c, s, spec),
            mesh=mesh, in_specs=P(None, "sp"), out_specs=P(None, "sp"), check_vma=False,
        )  # fmt: skip
        return jnp.sin(local(q, k, v, segments).astype(jnp.float32)).sum()

    q = jax.ShapeDtypeStruct((1, length, 4, 16), dtype)
    kv = jax.ShapeDtypeStruct((1, length, 2, 16), dtype)
    return loss, (q, kv, kv, jax.ShapeDtypeStruct((1, length), "int32"))


class Transfer(NamedTuple):
    """A collective of the traced program, forward and backward, on one device."""

    kind: str
    dtype: str
    bytes: float  # that the device sends each time
    times: int


def _transfers(world: int, length: int, mask: AttentionMask = CAUSAL, **options: Any) -> list[Transfer]:
    """Every collective of bfloat16 attention but those of integers."""
    found: list[Transfer] = []

    def walk(jaxpr: Any, times: int) -> None:
        for equation in jaxpr.eqns:
            name, again = equation.primitive.name, 1
            if name in ("ppermute", "all_gather", "all_to_all", "reduce_scatter"):
                given, groups = equation.invars[0].aval, equation.params.get("axis_index_groups")
                ranks = len(groups[0]) if groups else world
                # What a device has goes to each of the others, or of what is dealt out all parts but its own.
                share = {"ppermute": 1.0, "all_gather": ranks - 1}.get(name, (ranks - 1) / ranks)
                if not jnp.issubdtype(given.dtype, jnp.integer):
                    found.append(Transfer(name, str(given.dtype), share * given.size * given.dtype.itemsize, times))
            if name == "scan":
                again = equation.params["length"]
            for value in equation.params.values():
                for inner in value if isinstance(value, (tuple, list)) else (value,):
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        walk(inner, times * again)

    loss, arguments = _loss(world, length, "bfloat16", mask, **options)
    walk(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*arguments).jaxpr, 1)
    return found


def _sent(world: int, length: int, mask: AttentionMask = CAUSAL, **options: Any) -> Counter[tuple[str, str]]:
    """(collective, dtype) → executions on one device of forward and backward."""
    counts: Counter[tuple[str, str]] = Counter()
    for one in _transfers(world, length, mask, **options):
        counts[one.kind, one.dtype] += one.times
    return +counts


def test_a_kernel_of_another_device_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="needs a TPU, but the devices are cpu; use kernel = 'xla'"):
        attention_spec(AttentionOptions(kernel="pallas-tpu"), ring(2), "sp", 64, CAUSAL, 16)


def test_one_rank_sends_nothing() -> None:
    assert not _sent(1, 64)


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_keys_travel_in_their_own_dtype_and_gradients_in_float32(world: int) -> None:
    """n−1 transfers of K and V in each pass, n of dK and dV, the last of them finished: two arrays each."""
    sent = {("ppermute", "bfloat16"): 2 * 2 * (world - 1) + 2, ("ppermute", "float32"): 2 * (world - 1)}
    assert _sent(world, 192) == sent


def test_hops_out_of_the_window_are_not_sent() -> None:
    """A window of less than a rank's tokens needs one hop of eight; in zigzag halves the neighbours on either side."""
    window = AttentionMask("causal", window=16)
    near = _sent(8, 256, window, layout="contiguous")
    assert near == {("ppermute", "bfloat16"): 6, ("ppermute", "float32"): 2}
    folded = _sent(8, 256, window, layout="zigzag")
    assert folded == {("ppermute", "bfloat16"): 10, ("ppermute", "float32"): 4}


def test_what_the_other_strategies_send() -> None:
    """Two gathers a pass and a scatter of float32 gradients; eight all-to-alls; both kinds where both are used."""
    assert _sent(4, 256, strategy="allgather") == {("all_gather", "bfloat16"): 4, ("reduce_scatter", "float32"): 2}
    assert _sent(2, 256, strategy="ulysses") == {("all_to_all", "bfloat16"): 8}
    assert _sent(4, 256, strategy="usp") == {
        ("all_to_all", "bfloat16"): 8, ("ppermute", "bfloat16"): 6, ("ppermute", "float32"): 2
    }  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "mask"),
    [*((strategy, CAUSAL) for strategy in STRATEGIES), ("ring", AttentionMask("causal", window=16))],
)
@pytest.mark.parametrize("world", [1, 4, 8])
def test_the_bytes_are_those_that_costs_are_estimated_from(world: int, strategy: str, mask: AttentionMask) -> None:
    """What ``auto`` and the benchmark ``strategies`` take for sent is what the program sends."""
    if strategy == "ulysses" and world == 8:
        world = 2  # four heads
    shape = AttentionShape(256, heads=4, kv_heads=2, head_dim=16, mask=mask)
    inner = {1: 1, 2: 1, 4: 2, 8: 2}[world]
    expected = strategy_cost(strategy, shape, world, MachineRates(1.0, 1.0), "contiguous", inner).sent
    found = _transfers(world, 256, mask, strategy=strategy, layout="contiguous")
    assert sum(one.bytes * one.times for one in found) == expected


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("ids", [None, [700, 1, 300, 1047]], ids=["one", "packed"])
def test_executed_blocks_are_those_that_the_kernels_compute(kind: str, ids: list[int] | None) -> None:
    """Rank by rank over a whole ring of four: what ``executed_blocks`` says, the plan of the TPU kernel and the chunks
    of the plain one do not skip."""
    length, world, block = 2048, 4, 128
    layout = SequenceLayout(kind, world)
    segments = None if ids is None else np.repeat(np.arange(1, len(ids) + 1), ids).astype(np.int32)
    dealt = None if segments is None else segments[layout.permutation(length)].reshape(world, 1, -1)
    spec = AttentionSpec("sp", layout, length, CAUSAL, xla.XlaKernel(1.0, block, block))
    x = jnp.zeros((1, length // world, 1, 64), jnp.bfloat16)
    every_pair = jax.vmap(jax.vmap(xla.classify, in_axes=(None, 0)), in_axes=(0, None))

    @jax.jit
    def live(rank: jax.Array, source: jax.Array, mine: Any, theirs: Any) -> tuple[jax.Array, jax.Array]:
        queries, keys = spec.queries(rank, mine), spec.keys(source, theirs)
        prepared = plan.prepare(x, queries, block)
        cut = plan.cut(prepared, x, x, keys, block, block)
        planned = plan.classify(prepared.rows, plan.key_rows(keys, cut), cut)
        chunks = every_pair(xla.split_query_mask(queries, block), xla.split_key_mask(keys, block))
        return (planned != xla.SKIP).sum(), (chunks != xla.SKIP).sum()

    counted = np.zeros((2, world), int)
    for rank in range(world):
        for source in range(world):
            ids_of = (None, None) if dealt is None else (dealt[rank], dealt[source])
            counted[:, rank] += np.array(live(rank, source, *ids_of))
    expected = executed_blocks(CAUSAL, layout, length, block, segments)
    assert counted.tolist() == [expected.tolist()] * 2


def test_no_buffer_grows_with_the_square_of_the_length() -> None:
    """Neither the whole S×S nor a rank's C×C scores exist in the lowered program, and no mask of that size."""
    world, length = 4, 2048
    loss, arguments = _loss(world, length, "float32", CAUSAL)
    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arguments).as_text()
    local = length // world
    for rows in (length, local):
        for columns in (length, local):
            assert f"x{rows}x{columns}x" not in text, (rows, columns)


@pytest.mark.parametrize("kernel", [{"kernel": "xla"}, {"kernel": "cudnn", "interpret": True}])
def test_float32_is_multiplied_in_full_precision(kernel: dict[str, Any]) -> None:
    """Every product says so, as GPUs and TPUs would round its operands by default; bfloat16 leaves it to the device."""
    for dtype, precise in (("float32", True), ("bfloat16", False)):
        loss, arguments = _loss(2, 128, dtype, CAUSAL, **kernel)
        text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arguments).as_text()
        products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
        assert len(products) > 6 and all(("[HIGHEST, HIGHEST]" in line) == precise for line in products), dtype
