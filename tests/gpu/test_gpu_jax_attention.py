"""The kernels of ``jax-ring`` on an NVIDIA GPU, against the float64 oracle: ``pytest -m gpu tests/gpu``.

Shapes: B batch, S sequence, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lwm_core.attention import AttentionMask
from lwm_core.reference import attention_backward, attention_forward
from lwm_core.testing import attention_harness, relative_l2

pytestmark = pytest.mark.gpu

MASKS = {
    "causal": AttentionMask("causal"),
    "full": AttentionMask("full"),
    "window": AttentionMask("causal", window=300),
    "block-causal": AttentionMask("block_causal", block=96),
}


@pytest.fixture(scope="module", autouse=True)
def gpu() -> None:
    jax = pytest.importorskip("jax")
    if not any(device.platform in ("gpu", "cuda") for device in jax.devices()):
        pytest.skip("jax sees no NVIDIA GPU")


def errors(kernel: str, mask: AttentionMask, packed: bool, dtype: str = "bfloat16") -> dict[str, float]:
    """Relative L2 error of out, lse and gradients, grouped heads, one device."""
    import ml_dtypes

    random = np.random.default_rng(0)
    shape, kind = (2, 2048, 8, 64), np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    q, dout = (random.standard_normal(shape).astype(kind) for _ in range(2))
    k, v = (random.standard_normal((*shape[:2], 2, 64)).astype(kind) for _ in range(2))
    ids = np.sort(random.integers(0, 5, shape[:2]), axis=1).astype(np.int32) if packed else None
    block: dict[str, Any] = {"fused_block": 512} if kernel == "cudnn" else {}
    backend = attention_harness("jax-ring", 1, kernel=kernel, **block)
    out, lse = backend.forward(q, k, v, mask, ids)
    got = (out, lse, *backend.backward(q, k, v, mask, dout, ids))
    wide = [x.astype(np.float64) for x in (q, k, v)]
    expected_out, expected_lse = attention_forward(*wide, mask, ids)
    expected = (expected_out, expected_lse, *attention_backward(*wide, mask, dout.astype(np.float64), ids))
    seen = np.isfinite(expected_lse)
    assert np.array_equal(np.isneginf(lse), ~seen)
    return {
        name: relative_l2(a[seen] if name == "lse" else a.astype(np.float64), b[seen] if name == "lse" else b)
        for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, expected, strict=True)
    }


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_cudnn_is_as_right_as_xla(mask: str, packed: bool) -> None:
    """In bfloat16 at most one and a half times the error of the kernel in plain operations."""
    ours, plain = (errors(kernel, MASKS[mask], packed) for kernel in ("cudnn", "xla"))
    for name, error in ours.items():
        assert error < max(1.5 * plain[name], 4e-3), f"{name}: {error}, xla {plain[name]}"


@pytest.mark.parametrize("packed", [False, True])
def test_float32_is_not_rounded_to_tf32(packed: bool) -> None:
    """The kernel in plain operations keeps float32's 1e-5, which TF32, a GPU's default, would not."""
    for name, error in errors("xla", MASKS["causal"], packed, "float32").items():
        assert error < 1e-5, f"{name}: {error}"
