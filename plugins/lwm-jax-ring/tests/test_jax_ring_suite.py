"""The conformance kits on this plugin, and what they leave to a backend: its merge and its program's structure."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lwm_core.attention import AttentionMask
from lwm_core.layout import LAYOUTS, SequenceLayout
from lwm_core.reference import attention_forward
from lwm_core.testing import AttentionSuite, PluginSuite, relative_l2
from lwm_jax_ring.attention.blocks import Keys, Queries, natural_indices, to_natural
from lwm_jax_ring.attention.kernels import xla
from lwm_jax_ring.attention.ring import RingSpec, ring_attention


class TestRing(AttentionSuite):
    name = "jax-ring"
    options: ClassVar = {"strategy": "ring", "query_chunk": 4, "key_chunk": 4}  # so that chunks are skipped and masked


class TestAttentionPlugin(PluginSuite):
    kind, name = "attention", "jax-ring"


class TestTrainerPlugin(PluginSuite):
    kind, name = "trainer", "jax"


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_traced_indices_equal_the_cores(kind: str, world: int) -> None:
    """The indices that a program works out from its rank are the layout's, and going back to natural order is right."""
    layout = SequenceLayout(kind, world)
    length = layout.multiple * 5
    for rank in range(world):
        np.testing.assert_array_equal(natural_indices(layout, length, rank), layout.rank_indices(length, rank))
    np.testing.assert_array_equal(to_natural(jnp.asarray(layout.permutation(length)), layout), np.arange(length))


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
    split_q = xla.split_queries(jnp.asarray(q) * 0.5, 2, 4)
    state = xla.start(split_q)
    for block in order:
        part = slice(2 * block, 2 * block + 2)
        keys = Keys(jnp.asarray(index[part], jnp.int32), jnp.asarray(segments[:, part]))
        state = xla.forward_block(
            state, split_q, xla.split_query_mask(queries, 4), jnp.asarray(k[:, part]), jnp.asarray(v[:, part]), keys, 2
        )
    out, lse = xla.finish(state)
    out, lse = xla.join_queries(out, 8, 4), xla.join_queries(lse[..., None], 8, 4)[..., 0]
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
        spec = RingSpec("sp", SequenceLayout("contiguous"), length, mask, 8**-0.5, 16, 32)
        out = ring_attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), None, spec)
        assert relative_l2(np.asarray(out), attention_forward(q, k, v, mask)[0]) < 1e-6


def _program(world: int, length: int, dtype: str = "bfloat16") -> str:
    """The compiled forward and backward of a ring, as text."""
    mesh = Mesh(np.array(jax.devices()[:world]), ("sp",))
    spec = RingSpec("sp", SequenceLayout("zigzag", world), length, AttentionMask("causal"), 0.25, 32, 32)

    def loss(q, k, v, segments):  # type: ignore[no-untyped-def]
        local = jax.shard_map(
            lambda a, b, c, s: ring_attention(a, b, c, s, spec),
            mesh=mesh, in_specs=P(None, "sp"), out_specs=P(None, "sp"), check_vma=False,
        )  # fmt: skip
        return local(q, k, v, segments).astype(jnp.float32).sum()

    q = jax.ShapeDtypeStruct((1, length, 4, 16), dtype)
    kv = jax.ShapeDtypeStruct((1, length, 2, 16), dtype)
    segments = jax.ShapeDtypeStruct((1, length), "int32")
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, kv, kv, segments).as_text()


def test_one_rank_sends_nothing() -> None:
    assert "collective_permute" not in _program(1, 64)


def test_keys_travel_in_their_own_dtype_and_gradients_in_float32() -> None:
    """K, V and segment ids are sent inside the two loops; dK and dV inside the second, and once more to come home."""
    lines = [line for line in _program(4, 256).splitlines() if "collective_permute" in line]
    kinds = [line.rsplit("->", 1)[1].strip() for line in lines]
    wide = [kind for kind in kinds if "f32" in kind and "bf16" not in kind]
    narrow = [kind for kind in kinds if "bf16" in kind]
    assert len(narrow) == 4, kinds  # K and V in the forward loop, K and V in the backward loop
    assert len(wide) == 4, kinds  # dK and dV in the backward loop, dK and dV home


def test_no_buffer_grows_with_the_square_of_the_length() -> None:
    """Neither the whole S×S nor a rank's C×C scores exist in the lowered program, and no mask of that size."""
    world, length = 4, 2048
    text = _program(world, length, "float32")
    local = length // world
    for rows in (length, local):
        for columns in (length, local):
            assert f"x{rows}x{columns}x" not in text, (rows, columns)
