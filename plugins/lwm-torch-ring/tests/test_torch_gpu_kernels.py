"""The GPU kernels as far as a CPU goes: the conformance kit through them with their operators interpreted, the traps
that the operators have, which one is chosen and why. ``tests/gpu`` runs them on a GPU.

Shapes: B rows, S sequence, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch_interpreted import CUDNN, FLASH, VARLEN, Interpreter, flash3
from torch_threads import Street, neighbours, together

from lwm_core.attention import AttentionMask
from lwm_core.errors import UnsupportedError
from lwm_core.layout import LAYOUTS, SequenceLayout
from lwm_core.reference import attention_backward, attention_forward
from lwm_core.testing import AttentionSuite, relative_l2
from lwm_core.testing.attention_cases import MASKS, SEQ_LEN, as_dtype, inputs, packed
from lwm_torch_ring.attention.blocks import Plan
from lwm_torch_ring.attention.kernels import aten
from lwm_torch_ring.attention.kernels import flash3 as flash3_kernel
from lwm_torch_ring.attention.kernels.aten import CudaFlash, CudaVarlen, Cudnn
from lwm_torch_ring.attention.kernels.flash import FlashKernel
from lwm_torch_ring.attention.kernels.flash3 import Flash3
from lwm_torch_ring.attention.kernels.fused import Fused
from lwm_torch_ring.attention.kernels.math import MathKernel
from lwm_torch_ring.attention.options import AttentionOptions
from lwm_torch_ring.attention.rank import to_numpy, to_torch
from lwm_torch_ring.attention.strategies import (
    STRATEGIES,
    attention_spec,
    check_arrays,
    choose_kernel,
    inner_ranks,
    sequence_layout,
)
from lwm_torch_ring.attention.tiles import Pack, Spans, Tile

CAUSAL, CUDA = AttentionMask("causal"), torch.device("cuda", 0)
CUDNN_SMALL = Cudnn(grain=2)  # so that it computes at all at the kit's lengths


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    for known in (aten._op, aten._lse_dims, flash3_kernel._calls):
        known.cache_clear()


def interpreted(patch: pytest.MonkeyPatch, exact: bool = True, lse_dims: int = 4, older: bool = False) -> Interpreter:
    """Every operator of the GPU kernels, for one test."""
    interpreter = Interpreter(exact, lse_dims)
    patch.setattr(aten, "_op", interpreter)
    patch.setitem(sys.modules, "flash_attn_interface", flash3(older, exact))
    patch.setattr(flash3_kernel, "find_spec", lambda name: name)
    aten._lse_dims.cache_clear()
    flash3_kernel._calls.cache_clear()
    return interpreter


# -- the kit -----------------------------------------------------------------------------------------------------------


class ThreadHarness:
    """The strategy on threads of this process, through a kernel that is given: NumPy in and out, natural order."""

    def __init__(self, options: AttentionOptions, world: int, fused: Fused) -> None:
        self._options, self._world, self._fused = options, world, fused

    def _all(self, arrays: list[NDArray[Any]], mask: AttentionMask, ids: NDArray[Any] | None, dout: Any) -> list[Any]:
        length, world = arrays[0].shape[1], self._world
        layout, street = sequence_layout(self._options, length, world), Street(world)
        order, inverse = layout.permutation(length), layout.inverse(length)
        everything = [*arrays, *([] if ids is None else [ids.astype(np.int32)]), *([] if dout is None else [dout])]
        dealt = [np.split(x[:, order], world, axis=1) for x in everything]

        def run(rank: int) -> list[NDArray[Any]]:
            mine = [to_torch(parts[rank]) for parts in dealt]
            q, k, v = mine[:3]
            segments = mine[3] if ids is not None else None
            check_arrays(q, k, v, segments, length // world)
            kernel = FlashKernel(q.shape[-1] ** -0.5, self._options.chunk, self._fused)
            peers = neighbours(street, rank, inner_ranks(self._options, world))
            spec = attention_spec(self._options, peers, length, mask, kernel)
            for x in (q, k, v):
                x.requires_grad_()
            out, lse = STRATEGIES[self._options.strategy].attention(q, k, v, segments, spec)
            if dout is None:
                return [to_numpy(out), to_numpy(lse)]
            return [to_numpy(x) for x in torch.autograd.grad(out, (q, k, v), mine[-1])]

        found = [run(0)] if world == 1 else together(world, run)
        return [np.concatenate(parts, axis=1)[:, inverse] for parts in zip(*found, strict=True)]

    def forward(self, q: Any, k: Any, v: Any, mask: AttentionMask, segment_ids: Any = None) -> Any:
        """out and lse."""
        return tuple(self._all([q, k, v], mask, segment_ids, None))

    def backward(self, q: Any, k: Any, v: Any, mask: AttentionMask, dout: Any, segment_ids: Any = None) -> Any:
        """dq, dk and dv."""
        return tuple(self._all([q, k, v], mask, segment_ids, dout))

    def close(self) -> None:
        """Nothing is kept."""


class TestCudaFlashInterpreted(AttentionSuite):
    """FlashAttention-2, its varlen operator for documents, in float32 so that the kit's tolerance tells mistakes."""

    name = "torch-ring"
    options: ClassVar = {"strategy": "ring", "chunk": 12}
    worlds = (1,)  # several ranks have tests of their own, below
    fused: ClassVar[Fused] = CudaFlash()
    expected: ClassVar[set[str]] = {FLASH, f"{VARLEN}_forward", f"{VARLEN}_backward"}

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _interpreted(cls) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            interpreter = interpreted(patch)
            yield
            assert set(interpreter.calls) >= cls.expected, interpreter.calls

    def make(self, world: int, **options: Any) -> Any:
        try:
            known = AttentionOptions(**{**self.options, **options})
        except ValidationError as error:
            raise UnsupportedError(f"torch-ring: {error}") from error
        return ThreadHarness(known, world, self.fused)


class TestCudnnInterpreted(TestCudaFlashInterpreted):
    fused: ClassVar[Fused] = CUDNN_SMALL
    expected: ClassVar = {CUDNN, f"{CUDNN}_backward", FLASH, f"{VARLEN}_forward", f"{VARLEN}_backward"}


class TestFlash3Interpreted(TestCudaFlashInterpreted):
    fused: ClassVar[Fused] = Flash3()
    expected: ClassVar[set[str]] = set()  # its functions are none of aten's


# -- what the kit leaves -----------------------------------------------------------------------------------------------


KERNELS: dict[str, Fused] = {"cuda-flash": CudaFlash(), "cudnn": CUDNN_SMALL, "flash-attn-3": Flash3()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_two_ranks(monkeypatch: pytest.MonkeyPatch, kernel: str, layout: Any) -> None:
    """Packed documents over both, in every layout and with every mask, forward and backward."""
    interpreted(monkeypatch)
    given = inputs(packed())
    arrays, ids = (given.q, given.k, given.v), given.segment_ids
    harness = ThreadHarness(AttentionOptions(chunk=4, layout=layout), 2, KERNELS[kernel])
    for mask in MASKS.values():
        out, lse = harness.forward(*arrays, mask, ids)
        got = out, np.nan_to_num(lse, neginf=0.0), *harness.backward(*arrays, mask, given.dout, ids)
        expected, expected_lse = attention_forward(*arrays, mask, ids)
        wanted = expected, np.nan_to_num(expected_lse, neginf=0.0)
        for x, y in zip(got, (*wanted, *attention_backward(*arrays, mask, given.dout, ids)), strict=True):
            assert relative_l2(x, y) < 1e-5


@pytest.mark.parametrize("ids", [None, packed()], ids=["one document", "packed"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_is_what_its_rounding_costs(monkeypatch: pytest.MonkeyPatch, kernel: str, ids: Any) -> None:
    """As they run: bfloat16 alone reaches the operators, and two ranks' sums of it stay near float64."""
    interpreted(monkeypatch, exact=False)
    given = as_dtype(inputs(ids), "bfloat16")
    harness = ThreadHarness(AttentionOptions(chunk=4), 2, KERNELS[kernel])
    arrays = given.q, given.k, given.v
    wide = [x.astype(np.float64) for x in (*arrays, given.dout)]
    for mask in (CAUSAL, MASKS["block-causal"]):
        out, lse = harness.forward(*arrays, mask, ids)
        expected, expected_lse = attention_forward(*wide[:3], mask, ids)
        assert relative_l2(out.astype(np.float64), expected) < 4e-3
        assert relative_l2(np.nan_to_num(lse, neginf=0.0), np.nan_to_num(expected_lse, neginf=0.0)) < 1e-5
        gradients = harness.backward(*arrays, mask, given.dout, ids)
        for got, wanted in zip(gradients, attention_backward(*wide[:3], mask, wide[3], ids), strict=True):
            assert relative_l2(got.astype(np.float64), wanted) < 6e-3


def _one(fused: Fused, rows: int = 2) -> tuple[Any, ...]:
    """A diagonal tile of the kit's shapes through a kernel, forward and backward, and float64's."""
    given = inputs(None)
    q, k, v, dout = (torch.from_numpy(x[:rows]) for x in (given.q, given.k, given.v, given.dout))
    side = slice(0, SEQ_LEN)
    kernel, tile = FlashKernel(0.25, 4, fused), Tile(slice(None), side, side, "diagonal")
    out, lse = kernel.forward(q, k, v, tile)
    gradients = kernel.backward(dout, q, k, v, out, lse, tile)
    expected = attention_forward(*(x.numpy() for x in (q, k, v)), CAUSAL)
    wanted = attention_backward(*(x.numpy() for x in (q, k, v)), CAUSAL, dout.numpy())
    return (out, lse, *gradients), (*expected, *wanted)


@pytest.mark.parametrize("lse_dims", [3, 4])
def test_cudnn_s_lse_has_a_last_dimension_or_none(monkeypatch: pytest.MonkeyPatch, lse_dims: int) -> None:
    """Whatever the forward pass gives, the backward pass is given, and the kernel's own is ``[B,c,H]``."""
    interpreter = interpreted(monkeypatch, lse_dims=lse_dims)
    got, expected = _one(Cudnn(grain=SEQ_LEN))
    assert all(relative_l2(x.numpy(), y) < 1e-5 for x, y in zip(got, expected, strict=True))
    assert interpreter.calls[f"{CUDNN}_backward"] == 1 and FLASH not in interpreter.calls


def test_cudnn_reads_every_tensor_by_the_strides_of_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of one shape from tensors of other strides, and a gradient that is expanded: one plan fits them all."""
    interpreted(monkeypatch)
    q, k, v = (torch.randn(2, 16, heads, 8) for heads in (4, 2, 2))
    whole, part = Tile(slice(None), slice(0, 8), slice(0, 8), "diagonal"), slice(8, 16)
    kernel = FlashKernel(0.3, 4, CUDNN_SMALL)
    for given in ((q[:, :8], k[:, :8], v[:, :8]), (q[:, part], k[:, part].clone(), v[:, part])):
        for dout in (torch.ones(()).expand(2, 8, 4, 8), torch.randn(2, 4, 8, 8).transpose(1, 2)):
            out, lse = kernel.forward(*given, whole)
            got = kernel.backward(dout, *given, out.transpose(1, 2).clone().transpose(1, 2), lse, whole)
            wanted = MathKernel(0.3, 8).backward(dout, *given, out, lse, whole)
            assert all(relative_l2(x, y) < 1e-5 for x, y in zip(got, wanted, strict=True))


def test_cudnn_leaves_odd_shapes_to_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter = interpreted(monkeypatch)
    got, expected = _one(Cudnn())  # 96 tokens, which 128 does not divide
    assert all(relative_l2(x.numpy(), y) < 1e-5 for x, y in zip(got, expected, strict=True))
    assert CUDNN not in interpreter.calls and interpreter.calls[FLASH] == 1


@pytest.mark.parametrize("fused", [CudaFlash(), Flash3()], ids=["cuda-flash", "flash-attn-3"])
@pytest.mark.parametrize("lengths", [[1, 1, 1], [3, 1, 5]])
def test_packs_of_single_queries_with_grouped_heads(
    monkeypatch: pytest.MonkeyPatch, fused: Fused, lengths: list[int]
) -> None:
    """The operator's own shortcut for them, which mixes up lse, is never taken."""
    interpreted(monkeypatch)
    total = sum(lengths)
    q, dout = (torch.randn(total, 4, 8) for _ in range(2))
    k, v = (torch.randn(total, 2, 8) for _ in range(2))
    edges = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    kernel, plain = FlashKernel(0.3, 4, fused).packed, MathKernel(0.3, 8)
    assert kernel is not None
    for diagonal in (True, False):
        spans = Spans(edges, edges, max(lengths), max(lengths))
        out, lse = kernel.forward(q, k, v, spans, diagonal)
        gradients = kernel.backward(dout, q, k, v, out, lse, spans, diagonal)
        for start, size in zip(edges.tolist(), lengths, strict=False):
            side = slice(0, size)
            tile = Tile(slice(None), side, side, "diagonal" if diagonal else "whole")
            part = [x[None, start : start + size] for x in (dout, q, k, v, out, lse)]
            wanted = *plain.forward(*part[1:4], tile), *plain.backward(*part, tile)
            for got, want in zip((out, lse, *gradients), wanted, strict=True):
                torch.testing.assert_close(got[start : start + size], want[0], rtol=1e-5, atol=1e-5)


def test_documents_take_a_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty of them in a row: one call for all, forward and backward; nothing goes to plain operations."""
    interpreter = interpreted(monkeypatch)
    monkeypatch.setattr(MathKernel, "forward", None)
    ids = np.repeat(np.arange(1, 41, dtype=np.int32), np.random.default_rng(0).integers(1, 30, 40))[None]
    q, k, v, dout = (np.random.default_rng(n).standard_normal((*ids.shape, 2, 8), np.float32) for n in range(4))
    harness = ThreadHarness(AttentionOptions(), 1, CudaFlash())
    gradients = harness.backward(q, k, v, CAUSAL, dout, ids)
    for got, wanted in zip(gradients, attention_backward(q, k, v, CAUSAL, dout, ids), strict=True):
        assert relative_l2(got, wanted) < 1e-5
    assert interpreter.calls[f"{VARLEN}_forward"] <= 2 and interpreter.calls[f"{VARLEN}_backward"] <= 2


def test_an_lse_of_another_shape_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch whose lse is padded by sequences, as older ones had it."""
    monkeypatch.setattr(aten, "_op", lambda name: lambda q, *args, **named: (q, torch.zeros(2, 4, 8)))
    q, edges = torch.randn(6, 4, 8), torch.tensor([0, 2, 6], dtype=torch.int32)
    with pytest.raises(UnsupportedError, match=r"gave lse \(2, 4, 8\) torch.float32, expected \(4, 6\)"):
        CudaVarlen().forward(q, q, q, Spans(edges, edges, 4, 4), 0.3, True)


# -- the choice --------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An H100 that is there as far as one may ask."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91_900)
    return monkeypatch


def chosen(**options: Any) -> tuple[str, str]:
    name, why = choose_kernel(AttentionOptions(**options), CUDA, torch.bfloat16, 128)
    return name, "\n".join(why)


def test_an_h100_takes_cudnn_and_the_package_where_it_is_installed(gpu: pytest.MonkeyPatch) -> None:
    name, why = chosen()
    assert name == "cudnn" and "kernel flash-attn-3: flash_attn_interface is not installed" in why
    interpreted(gpu)
    assert chosen()[0] == "flash-attn-3"
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    name, why = chosen()
    assert name == "cudnn" and "kernel flash-attn-3: it needs a Hopper GPU" in why


def test_what_is_older_or_turned_off_takes_another(gpu: pytest.MonkeyPatch) -> None:
    """A100: FlashAttention-2; V100: plain operations; cuDNN off, old, not deterministic, too wide: FlashAttention-2."""
    gpu.setattr(torch.backends.cudnn, "version", lambda: 90_000)
    assert chosen()[0] == "cuda-flash" and "cuDNN 90100 or newer, torch has 90000" in chosen()[1]
    gpu.setattr(torch.backends.cudnn, "version", lambda: 91_900)
    with gpu.context() as patch:
        patch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
        assert chosen()[0] == "cuda-flash" and "turned it off" in chosen()[1]
    torch.use_deterministic_algorithms(True)
    try:
        assert chosen()[0] == "cuda-flash" and "differ from run to run" in chosen()[1]
    finally:
        torch.use_deterministic_algorithms(False)
    assert choose_kernel(AttentionOptions(), CUDA, torch.bfloat16, 256)[0] == "cuda-flash"
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert chosen()[0] == "cuda-flash" and "kernel cudnn: it needs a GPU of compute capability 9.0" in chosen()[1]
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert chosen()[0] == "math"
    with pytest.raises(UnsupportedError, match=r"'cudnn' cannot be used: it needs a GPU of compute capability 9\.0"):
        chosen(kernel="cudnn")


@pytest.mark.parametrize("name", [CUDNN, f"{CUDNN}_backward"])
def test_a_torch_without_cudnn_s_operator_takes_flash(gpu: pytest.MonkeyPatch, name: str) -> None:
    gpu.setitem(aten._BINDINGS, name, ("query key value",))
    aten._op.cache_clear()
    found, why = chosen()
    assert found == "cuda-flash" and f"does not bind aten::{name} as it is known" in why


def test_a_torch_without_varlen_computes_documents_one_by_one(gpu: pytest.MonkeyPatch) -> None:
    """And says so; its plans have no packs."""
    gpu.setitem(aten._BINDINGS, f"{VARLEN}_backward", ())
    aten._op.cache_clear()
    name, why = chosen()
    assert name == "cudnn" and "kernel cudnn computes documents one by one: torch" in why
    assert FlashKernel(1.0, 4, Cudnn()).packed is None


@pytest.mark.parametrize("more", ["", " block_table", " block_table num_splits"])
def test_the_varlen_operator_is_known_in_all_its_versions(more: str) -> None:
    """As torch 2.11 binds it, and as later ones do."""
    names = " ".join(a.name for a in torch.ops.aten._flash_attention_forward.default._schema.arguments)
    assert names.split(" block_table")[0] + more in aten._BINDINGS[f"{VARLEN}_forward"]


@pytest.mark.parametrize("older", [False, True])
def test_flash_attention_3_is_bound_by_the_names_of_its_arguments(monkeypatch: pytest.MonkeyPatch, older: bool) -> None:
    """Today's and those of its first betas; another is told apart."""
    interpreted(monkeypatch, older=older)
    got, expected = _one(Flash3())
    assert all(relative_l2(x.numpy(), y) < 1e-5 for x, y in zip(got, expected, strict=True))
    module: Any = sys.modules["flash_attn_interface"]
    monkeypatch.setattr(module, "_flash_attn_backward", lambda dout, q, k, v, softmax_lse, causal: None)
    flash3_kernel._calls.cache_clear()
    assert "does not bind" in Flash3().varlen.objection()  # type: ignore[union-attr]


def test_flash_attention_3_as_operators_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package registers its functions as operators, whose names are in a schema."""
    from torch import library

    @library.custom_op("lwm_test_flash3::forward", mutates_args=())
    def forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, qv: torch.Tensor | None = None,
        cu_seqlens_q: torch.Tensor | None = None, cu_seqlens_k: torch.Tensor | None = None,
        max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, softmax_scale: float | None = None,
        causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        return q.clone(), q.new_zeros(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)

    call = flash3_kernel._call(forward, flash3_kernel._FORWARD)
    assert not isinstance(call, str), call
    assert call(False, q=torch.ones(1, 2, 3, 8), k=torch.ones(1, 2, 3, 8), v=torch.ones(1, 2, 3, 8),
                softmax_scale=0.3)[1].shape == (1, 3, 2)  # fmt: skip


def test_a_package_that_cannot_be_imported_is_no_kernel(gpu: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> None:
        raise ImportError("libcudart.so.11: cannot open")

    gpu.setattr(flash3_kernel, "find_spec", lambda name: name)
    gpu.setattr(flash3_kernel, "import_module", fails)
    flash3_kernel._calls.cache_clear()
    assert "cannot be imported: libcudart" in chosen()[1] and chosen()[0] == "cudnn"


def test_a_pack_is_no_larger_than_the_rank_s_tokens() -> None:
    """Documents in blocks see their earlier blocks again and again, which no pack gathers twice."""
    ids = np.repeat(np.arange(1, 5, dtype=np.int32), 64)[None]
    plan = Plan(AttentionMask("block_causal", block=8), SequenceLayout("contiguous"), 256, 0, 16, None, ids, True)
    found = [pack for pack in plan.tiles(0) if isinstance(pack, Pack)]
    assert found
    for pack in found:
        for side in zip(*pack.parts, strict=True):
            assert sum(part.stop - part.start for part in side) <= 256
    assert all(not isinstance(tile, Tile) or tile.kind != "ragged" for tile in plan.tiles(0))
