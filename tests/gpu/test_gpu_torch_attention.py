"""The GPU kernels of ``torch-ring`` on an NVIDIA GPU, against the float64 oracle: ``pytest -m gpu tests/gpu``.

A kernel that cannot run on the GPU at hand (``cudnn`` and ``flash-attn-3`` need a Hopper) is skipped by name. The cases
are the conformance kit's: its masks, layouts, numbers of ranks and documents. Several ranks are played through one
after the other on the one device, with the plugin's own blocks, merges and sums.

Shapes: B batch, S sequence, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lwm_core.attention import AttentionMask
from lwm_core.layout import LAYOUTS, SequenceLayout
from lwm_core.reference import attention_backward, attention_forward
from lwm_core.testing import relative_l2
from lwm_core.testing.attention_cases import MASKS, SEQ_LEN, inputs, matrix, packed, unseen

pytestmark = pytest.mark.gpu

DEVICE, CHUNK = "cuda", 4  # a chunk with which tiles of every kind occur
KERNELS = ("cuda-flash", "cudnn", "flash-attn-3")
LARGE_MASKS = {
    "causal": AttentionMask("causal"),
    "full": AttentionMask("full"),
    "window": AttentionMask("causal", window=300),
    "block-causal": AttentionMask("block_causal", block=96),
}
NAMES = ("out", "dq", "dk", "dv")
CASES = [
    *((*case, "packed") for case in matrix()),
    *((2, layout, mask, documents) for layout in LAYOUTS for mask in MASKS for documents in ("one", "unseen")),
]


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("lwm_torch_ring")
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no NVIDIA GPU")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))  # where rings are played through


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, gpu: None) -> str:
    """Each kernel that the GPU at hand can run."""
    import torch

    from lwm_torch_ring.attention.strategies import FUSED

    (fused,) = (fused for fused in FUSED if fused.name == request.param)
    objection = fused.objection(torch.device(DEVICE), torch.bfloat16, 64)
    if objection:
        pytest.skip(f"{request.param}: {objection}")
    return str(request.param)


def tensors(*arrays: NDArray[Any]) -> list[Any]:
    """bfloat16 on the GPU."""
    import torch

    return [torch.from_numpy(array).to(DEVICE, torch.bfloat16) for array in arrays]


def host(tensor: Any) -> NDArray[np.float64]:
    """float64."""
    found: NDArray[np.float64] = tensor.detach().double().cpu().numpy()
    return found


def oracle(arrays: list[Any], mask: AttentionMask, ids: NDArray[np.int32] | None) -> list[NDArray[np.float64]]:
    """out, dq, dk, dv and lse in float64, of what the GPU is given."""
    q, k, v, dout = map(host, arrays)
    out, lse = attention_forward(q, k, v, mask, ids)
    return [out, *attention_backward(q, k, v, mask, dout, ids), lse]


def played(
    kernel: str, arrays: list[Any], layout: SequenceLayout, mask: AttentionMask, ids: NDArray[np.int32] | None,
    grain: int = 16,
) -> list[NDArray[np.float64]]:  # fmt: skip
    """out, dq, dk and dv of all ranks of a ring; ``grain`` is of ``cudnn``, so small that the kit's tiles go to it."""
    import torch
    from bench_torch_played import PlayedRing

    from lwm_torch_ring.attention.kernels.aten import Cudnn
    from lwm_torch_ring.attention.kernels.flash import FlashKernel
    from lwm_torch_ring.attention.options import AttentionOptions
    from lwm_torch_ring.attention.strategies import make_kernel

    q = arrays[0]
    made = make_kernel(AttentionOptions(kernel=kernel, chunk=CHUNK), torch.device(DEVICE), q.dtype, q.shape[-1])
    if kernel == "cudnn":
        made = FlashKernel(made.scale, CHUNK, Cudnn(grain=grain))
    ring = PlayedRing(layout, q.shape[1], mask, made, ids)
    return [host(ring.natural(x)) for x in ring.run(*map(ring.deal, arrays))]


def alone(
    kernel: str, arrays: list[Any], mask: AttentionMask, ids: NDArray[np.int32] | None
) -> list[NDArray[np.float64]]:
    """out, dq, dk, dv and lse of the backend itself, one process, through autograd."""
    import torch

    from lwm_core.protocols import AttentionAxes
    from lwm_torch_ring.attention.backend import factory
    from lwm_torch_ring.attention.options import AttentionOptions

    q, k, v, dout = arrays
    backend = factory.build(AttentionOptions(kernel=kernel), None, AttentionAxes(), q.shape[1])
    segments = None if ids is None else torch.from_numpy(ids).to(DEVICE)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = backend.forward(*leaves, mask, segments)
    return [host(x) for x in (out, *torch.autograd.grad(out, leaves, dout), lse)]


def compare(
    ours: list[NDArray[np.float64]], plain: list[NDArray[np.float64]], expected: list[NDArray[np.float64]]
) -> None:
    """At most one and a half times the error of the kernel in plain operations, or what bfloat16 itself costs."""
    for name, got, other, wanted in zip(NAMES, ours, plain, expected, strict=False):
        assert np.isfinite(got).all(), name
        error, bound = relative_l2(got, wanted), max(1.5 * relative_l2(other, wanted), 4e-3)
        assert error < bound, f"{name}: {error}, expected less than {bound}"


@pytest.mark.parametrize(("world", "layout", "mask", "documents"), CASES)
def test_the_kit_s_cases(kernel: str, world: int, layout: Any, mask: str, documents: str) -> None:
    """Out and gradients as right as by the kernel ``math``; where a query sees nothing, all is 0."""
    dealt = SequenceLayout(layout, world)
    ids = {"one": None, "packed": packed(), "unseen": unseen(dealt, "every-shard")}[documents]
    given = inputs(ids)
    arrays = tensors(given.q, given.k, given.v, given.dout)
    ours, plain = (played(name, arrays, dealt, MASKS[mask], ids) for name in (kernel, "math"))
    expected = oracle(arrays, MASKS[mask], ids)
    compare(ours, plain, expected)
    if ids is not None:
        assert not any(x[ids == 0].any() for x in ours)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("mask", LARGE_MASKS)
def test_the_backend_through_autograd(kernel: str, mask: str, several: bool) -> None:
    """One process, large tiles, grouped heads, lse too; −inf where nothing is seen."""
    random = np.random.default_rng(0)
    shape = (2, 1024, 4, 64)
    q, dout = (random.standard_normal(shape, dtype=np.float32) for _ in range(2))
    k, v = (random.standard_normal((*shape[:2], 2, 64), dtype=np.float32) for _ in range(2))
    ids = np.sort(random.integers(0, 5, shape[:2]), axis=1).astype(np.int32) if several else None
    arrays = tensors(q, k, v, dout)
    ours, plain = (alone(name, arrays, LARGE_MASKS[mask], ids) for name in (kernel, "math"))
    expected = oracle(arrays, LARGE_MASKS[mask], ids)
    compare(ours, plain, expected)
    assert np.array_equal(np.isneginf(ours[-1]), np.isneginf(expected[-1]))
    assert relative_l2(ours[-1], expected[-1]) < 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_token_changes_nothing_before_it(kernel: str, layout: Any) -> None:
    """Bit for bit, in every layout; something from it on does change."""
    given, token = inputs(None), SEQ_LEN // 2 + 1
    dealt, mask = SequenceLayout(layout, 4), AttentionMask("causal")
    changed = given.perturb(0, token)
    both = (tensors(x.q, x.k, x.v, x.dout) for x in (given, changed))
    before, after = (played(kernel, arrays, dealt, mask, None)[0] for arrays in both)
    assert np.array_equal(before[0, :token], after[0, :token]) and np.array_equal(before[1], after[1])
    assert not np.array_equal(before[0, token:], after[0, token:])


@pytest.mark.parametrize("groups", [1, 4])
def test_short_documents_of_many_lengths(kernel: str, groups: int) -> None:
    """Two rows of dozens of them, of one token too, on four ranks: packs, as right as by the kernel ``math``."""
    random = np.random.default_rng(0)
    length, shape = 512, (2, 512, 4, 64)
    ids = np.stack([np.repeat(np.arange(1, 401), random.integers(1, 40, 400))[:length] for _ in range(2)])
    q, dout = (random.standard_normal(shape, dtype=np.float32) for _ in range(2))
    k, v = (random.standard_normal((*shape[:2], 4 // groups, 64), dtype=np.float32) for _ in range(2))
    arrays, ids = tensors(q, k, v, dout), ids.astype(np.int32)
    mask = AttentionMask("causal")
    for layout in LAYOUTS:
        dealt = SequenceLayout(layout, 4)
        compare(*(played(name, arrays, dealt, mask, ids) for name in (kernel, "math")), oracle(arrays, mask, ids))


@pytest.mark.parametrize("lengths", [[1] * 5, [1, 7, 2, 130]])
@pytest.mark.parametrize("diagonal", [False, True])
def test_a_pack_is_its_tiles(kernel: str, diagonal: bool, lengths: list[int]) -> None:
    """out and lse ``[Q,H]`` of each sequence, grouped heads, single queries too; the layout of lse above all."""
    import torch

    from lwm_torch_ring.attention.kernels.math import MathKernel
    from lwm_torch_ring.attention.options import AttentionOptions
    from lwm_torch_ring.attention.strategies import make_kernel
    from lwm_torch_ring.attention.tiles import Pack, Tile

    edges, random = np.cumsum([0, *lengths]).tolist(), np.random.default_rng(0)
    parts = [slice(a, b) for a, b in pairwise(edges)]
    sizes = (edges[-1], 8, 64), (edges[-1], 2, 64), (edges[-1], 2, 64), (edges[-1], 8, 64)
    q, k, v, dout = tensors(*(random.standard_normal(size, dtype=np.float32) for size in sizes))
    packed = make_kernel(AttentionOptions(kernel=kernel), q.device, q.dtype, 64).packed
    assert packed is not None
    kind = "diagonal" if diagonal else "whole"
    spans = Pack(kind, tuple((part, part) for part in parts)).on(torch.device(DEVICE)).spans
    out, lse = packed.forward(q, k, v, spans, diagonal)
    gradients = packed.backward(dout, q, k, v, out, lse, spans, diagonal)
    for part in parts:
        tile = Tile(slice(None), slice(0, part.stop - part.start), slice(0, part.stop - part.start), kind)
        given = [x[None, part] for x in (dout, q, k, v, out, lse)]
        plain = MathKernel(64**-0.5, 512)
        wanted = *plain.forward(*given[1:4], tile), *plain.backward(*given, tile)
        for got, want in zip((out, lse, *gradients), wanted, strict=True):
            np.testing.assert_allclose(host(got[part]), host(want[0]), rtol=2e-2, atol=2e-2)
