"""The kernel ``cudnn`` as far as a machine without a GPU goes: which blocks it is given, what is lowered, refusals.

The kit runs it interpreted (``test_jax_kits.py``); ``tests/gpu`` runs it on a GPU.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from lwm_core.attention import AttentionMask
from lwm_core.errors import UnsupportedError
from lwm_jax_ring.attention.blocks import Keys, Queries
from lwm_jax_ring.attention.kernels.cudnn import CudnnFused
from lwm_jax_ring.attention.kernels.fused import DIAGONAL, MASKED, SKIP, WHOLE, FusedKernel, classify
from lwm_jax_ring.attention.kernels.xla import XlaKernel
from lwm_jax_ring.attention.options import AttentionOptions
from lwm_jax_ring.attention.strategies import attention_spec

CAUSAL = AttentionMask("causal")


def causal(first: int, ids: list[int] | None = None, window: int = 100) -> Queries:
    """Four queries from index ``first`` on, which see themselves and before."""
    index = jnp.arange(first, first + 4, dtype=jnp.int32)[None]
    segments = None if ids is None else jnp.asarray([ids], jnp.int32)
    return Queries(jnp.maximum(index - window + 1, 0), index, segments)


def keys(first: int, ids: list[int] | None = None, count: int = 4) -> Keys:
    """``count`` keys from index ``first`` on."""
    index = jnp.arange(first, first + count, dtype=jnp.int32)
    return Keys(index, None if ids is None else jnp.asarray([ids], jnp.int32))


@pytest.mark.parametrize(
    ("queries", "arrived", "kind"),
    [
        (causal(4), keys(8), SKIP),
        (causal(4), keys(0), WHOLE),
        (causal(4), keys(4), DIAGONAL),
        (causal(4), keys(3), MASKED),  # a diagonal, but not the one in the queries' own places
        (causal(4), keys(4, count=3), MASKED),
        (causal(4, window=4), keys(4), DIAGONAL),
        (causal(4, window=3), keys(4), MASKED),
        (causal(4, [1, 1, 1, 1]), keys(4, [1, 1, 1, 1]), DIAGONAL),
        (causal(4, [1, 1, 2, 2]), keys(4, [1, 1, 2, 2]), MASKED),
        (causal(4, [1, 1, 1, 0]), keys(4, [1, 1, 1, 0]), MASKED),
        (causal(4, [0, 0, 0, 0]), keys(4, [0, 0, 0, 0]), SKIP),
    ],
)
def test_blocks_are_told_apart(queries: Queries, arrived: Keys, kind: int) -> None:
    assert int(classify(queries, arrived)) == kind


def test_forward_and_backward_are_lowered_to_cudnn() -> None:
    """For CUDA, without a GPU: both custom calls are there, each for whole blocks and for the diagonal."""
    kernel = FusedKernel(0.125, 256, CudnnFused(), XlaKernel(1.0, 64, 64))
    index = jnp.arange(512, dtype=jnp.int32)
    mask, arrived = Queries(index[None] * 0, index[None], None), Keys(index, None)

    def both(q, k, v, dout):  # type: ignore[no-untyped-def]
        prepared = kernel.queries(q, mask, 2)
        out, lse = kernel.finish(kernel.absorb(kernel.start(prepared), prepared, k, v, arrived), 512)
        saved = kernel.saved(q, out, dout, lse, mask, 2)
        return kernel.gradients(kernel.start_gradient(saved), saved, k, v, arrived)

    q, k = (jax.ShapeDtypeStruct((1, 512, heads, 64), jnp.bfloat16) for heads in (4, 2))
    text = jax.jit(both).trace(q, k, k, q).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__cudnn$fmhaSoftmax(") == 2 and text.count("@__cudnn$fmhaSoftmaxBackward(") == 2
    for mask in ("CAUSAL", "NO_MASK"):
        assert text.count(rf"\22mask_type\22: \22{mask}\22") == 2


def test_what_cudnn_cannot_is_refused() -> None:
    mesh = Mesh(np.array(jax.devices()[:1]), ("sp",))
    with pytest.raises(UnsupportedError, match="needs an NVIDIA GPU, but the devices are cpu; use kernel = 'xla'"):
        attention_spec(AttentionOptions(kernel="cudnn"), mesh, "sp", 64, CAUSAL, 16)
    with pytest.raises(UnsupportedError, match="has no softcap"):
        attention_spec(AttentionOptions(kernel="cudnn", interpret=True, softcap=30.0), mesh, "sp", 64, CAUSAL, 16)
    kernel = FusedKernel(0.125, 64, CudnnFused(), XlaKernel(1.0, 64, 64))
    index = jnp.arange(64, dtype=jnp.int32)
    with pytest.raises(UnsupportedError, match="computes in bfloat16, got float32"):
        kernel.queries(jnp.zeros((1, 64, 2, 16)), Queries(index[None] * 0, index[None], None), 2)
