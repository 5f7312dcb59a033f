"""Every strategy with every kernel beside the float64 reference, and derivatives beyond the first of out.

Shapes: B batch, S sequence, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lwm_core.attention import AttentionMask
from lwm_core.errors import UnsupportedError
from lwm_core.reference import attention_backward, attention_forward
from lwm_core.testing import relative_l2
from lwm_jax_ring.attention.harness import JaxRingHarness
from lwm_jax_ring.attention.kernels.cudnn import CudnnFused
from lwm_jax_ring.attention.options import AttentionOptions
from lwm_jax_ring.attention.strategies import STRATEGIES, attention_spec

CAUSAL = AttentionMask("causal")
XLA = {"kernel": "xla", "query_chunk": 8, "key_chunk": 8}
PALLAS = {"kernel": "pallas-tpu", "interpret": True}
CUDNN = {"kernel": "cudnn", "interpret": True, "fused_block": 8, "query_chunk": 8, "key_chunk": 8}
REFUSED = "kernel 'pallas-tpu' has no gradient of lse and no second derivatives; use kernel = 'xla'"

Arrays = tuple[np.ndarray, ...]


def arrays(length: int, heads: int = 4, kv_heads: int = 2, dim: int = 16, seed: int = 0) -> Arrays:
    """q, k, v and dout of one row."""
    random = np.random.default_rng(seed)
    return tuple(random.standard_normal((1, length, n, dim), np.float32) for n in (heads, kv_heads, kv_heads, heads))


def documents(*lengths: int) -> np.ndarray:
    """``[1,S]`` segment ids."""
    return np.repeat(np.arange(1, len(lengths) + 1), lengths)[None].astype(np.int32)


def check(options: AttentionOptions, world: int, given: Arrays, ids: np.ndarray | None) -> None:
    """Hold out, lse and gradients to the reference, causal."""
    q, k, v, dout = given
    harness = JaxRingHarness(options, world)
    got = (*harness.forward(q, k, v, CAUSAL, ids), *harness.backward(q, k, v, CAUSAL, dout, ids))
    expected = (
        *attention_forward(q, k, v, CAUSAL, ids, softcap=options.softcap),
        *attention_backward(q, k, v, CAUSAL, dout, ids, softcap=options.softcap),
    )
    for name, actual, right in zip(("out", "lse", "dq", "dk", "dv"), got, expected, strict=True):
        assert relative_l2(actual, right) < 1e-5, name


@pytest.mark.parametrize(
    "kernel", [XLA | {"softcap": 2.0}, PALLAS | {"softcap": 2.0}, CUDNN], ids=lambda kernel: kernel["kernel"]
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_with_every_kernel(strategy: str, kernel: dict[str, Any]) -> None:
    """Over four devices, with documents over their borders; the soft-cap bends scores of up to about 4."""
    check(AttentionOptions(strategy=strategy, **kernel), 4, arrays(64), documents(5, 30, 1, 28))


def test_many_blocks_of_the_tpu_kernel_on_every_rank() -> None:
    """512 tokens a rank in blocks of 128, zigzag, documents over the borders of blocks and ranks: blocks are skipped,
    computed whole and masked."""
    options = AttentionOptions(block_q=128, block_k=128, **PALLAS)
    check(options, 2, arrays(1024, heads=2, kv_heads=1), documents(100, 500, 1, 300, 123))


def attention(strategy: str, kernel: dict[str, Any], length: int, dim: int) -> tuple[Callable[..., Any], Any]:
    """Functions of global q, k, v over four devices: (out, lse), not differentiable by rule, and out, which is."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("sp",))
    spec = attention_spec(
        AttentionOptions(strategy=strategy, layout="contiguous", **kernel), mesh, "sp", length, CAUSAL, dim
    )

    def mapped(function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.shard_map(
            lambda q, k, v: function(q, k, v, None, spec),
            mesh=mesh, in_specs=P(None, "sp"), out_specs=P(None, "sp"), check_vma=False,
        )  # fmt: skip

    return mapped(STRATEGIES[strategy].forward), mapped(STRATEGIES[strategy].attention)


@pytest.mark.parametrize(
    ("strategy", "kernel"),
    [*((strategy, kernel) for kernel in (XLA, PALLAS) for strategy in STRATEGIES), ("ring", CUDNN)],
    ids=lambda value: value["kernel"] if isinstance(value, dict) else value,
)
def test_the_gradient_of_lse_is_right_or_refused(strategy: str, kernel: dict[str, Any]) -> None:
    """d Σ w·lse: dq = scale·Σ_k w p k and dk = scale·Σ_q w p q; nothing for v, and never a silent zero."""
    length, dim = 64, 16
    q, k, v, _ = arrays(length, kv_heads=4)
    w = np.random.default_rng(5).standard_normal((1, length, 4)).astype(np.float32)
    both, _ = attention(strategy, kernel, length, dim)
    gradient = jax.jit(jax.grad(lambda q, k, v: (both(q, k, v)[1] * w).sum(), (0, 1, 2)))
    if kernel is PALLAS:
        with pytest.raises(UnsupportedError, match=REFUSED):
            gradient(q, k, v)
        return
    scores = np.einsum("qhd,khd->hqk", q[0], k[0]).astype(np.float64) / dim**0.5
    scores[:, np.triu(np.ones((length, length), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights *= w[0].T[..., None] / weights.sum(-1, keepdims=True)
    expected = [np.einsum("hqk,khd->qhd", weights, k[0]), np.einsum("hqk,qhd->khd", weights, q[0])]
    gradients = gradient(q, k, v)
    for got, right in zip(gradients[:2], expected, strict=True):
        assert relative_l2(np.asarray(got[0]), right / dim**0.5) < 1e-5
    assert not np.any(gradients[2])


@pytest.mark.parametrize("kernel", [XLA, CUDNN, PALLAS], ids=lambda kernel: kernel["kernel"])
def test_the_second_derivative_is_right_or_refused(kernel: dict[str, Any]) -> None:
    """The Hessian of Σ out·dout along a direction, against central differences of the reference's gradient."""
    length, dim, step = 32, 8, 1e-5
    q, k, v, dout = arrays(length, dim=dim)
    along = arrays(length, dim=dim, seed=9)[:3]
    _, out = attention("ring", kernel, length, dim)

    def slope(*given):  # type: ignore[no-untyped-def]
        gradients = jax.grad(lambda q, k, v: (out(q, k, v) * dout).sum(), (0, 1, 2))(*given)
        return sum((g * t).sum() for g, t in zip(gradients, along, strict=True))

    second = jax.jit(jax.grad(slope, (0, 1, 2)))
    if kernel is PALLAS:
        with pytest.raises(UnsupportedError, match=REFUSED):
            second(q, k, v)
        return
    sides = [
        attention_backward(*(x.astype(np.float64) + sign * step * t for x, t in zip((q, k, v), along, strict=True)),
                           CAUSAL, dout)
        for sign in (1.0, -1.0)
    ]  # fmt: skip
    for name, got, more, less in zip(("q", "k", "v"), second(q, k, v), *sides, strict=True):
        assert relative_l2(np.asarray(got), (more - less) / (2 * step)) < 1e-5, name


def test_cudnn_itself_is_not_differentiated() -> None:
    """Its own primitives, traced for a GPU that need not be there."""
    x = jnp.zeros((1, 64, 2, 64), jnp.bfloat16)
    with pytest.raises(UnsupportedError, match="kernel 'cudnn' has no gradient of lse and no second derivatives"):
        jax.make_jaxpr(jax.grad(lambda q: CudnnFused().forward(q, x, x, True)[1].sum()))(x)


def test_jit_equals_eager() -> None:
    """Operation by operation on four devices, forward and gradients."""
    q, k, v, dout = (jnp.asarray(x) for x in arrays(16, dim=8))
    _, out = attention("ring", XLA, 16, 8)

    def run(q, k, v, dout):  # type: ignore[no-untyped-def]
        found, pullback = jax.vjp(out, q, k, v)
        return found, *pullback(dout)

    for eager, compiled in zip(run(q, k, v, dout), jax.jit(run)(q, k, v, dout), strict=True):
        assert relative_l2(np.asarray(compiled), np.asarray(eager)) < 1e-6
