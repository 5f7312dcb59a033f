"""The strategies by name, and what options mean for a group of ranks: their layout, the kernel.

Shapes: B batch, S sequence, C tokens of a process, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor

from lwm_core.attention import AttentionMask
from lwm_core.errors import ShapeError, UnsupportedError
from lwm_core.layout import SequenceLayout
from lwm_torch_ring.attention.allgather import ALLGATHER
from lwm_torch_ring.attention.differentiable import attention
from lwm_torch_ring.attention.kernels.aten import CpuFlash, CudaFlash, Cudnn
from lwm_torch_ring.attention.kernels.contract import Kernel
from lwm_torch_ring.attention.kernels.flash import FlashKernel
from lwm_torch_ring.attention.kernels.flash3 import Flash3
from lwm_torch_ring.attention.kernels.fused import Fused
from lwm_torch_ring.attention.kernels.math import MathKernel
from lwm_torch_ring.attention.options import AttentionOptions
from lwm_torch_ring.attention.peers import Neighbourhood
from lwm_torch_ring.attention.ring import RING
from lwm_torch_ring.attention.spec import AttentionSpec, Movement
from lwm_torch_ring.attention.ulysses import exchanged_attention

DTYPES = (torch.float32, torch.bfloat16)


class Strategy(NamedTuple):
    """How keys move, and the function of (q, k, v, segments, spec, whether lse is wanted) → (out, lse) around it."""

    movement: Movement
    attention: Callable[[Tensor, Tensor, Tensor, Tensor | None, AttentionSpec, bool], tuple[Tensor, Tensor | None]]


STRATEGIES = {
    "ring": Strategy(RING, attention),
    "allgather": Strategy(ALLGATHER, attention),
    "ulysses": Strategy(RING, exchanged_attention),
    "usp": Strategy(RING, exchanged_attention),
}

FUSED: tuple[Fused, ...] = (CpuFlash(), Flash3(), Cudnn(), CudaFlash())
"""In the order in which ``auto`` takes them."""


def strategy_of(options: AttentionOptions) -> Strategy:
    """The strategy that options name; raises UnsupportedError while ``auto`` is not resolved."""
    if options.strategy == "auto":
        raise UnsupportedError("torch-ring: strategy 'auto' is not resolved; call the factory's resolve first")
    return STRATEGIES[options.strategy]


def inner_ranks(options: AttentionOptions, world: int) -> int:
    """Processes that exchange heads for tokens, of the ``world`` that hold the sequence.

    Raises:
        ShapeError: ``inner`` does not divide the world.
    """
    if options.strategy == "ulysses":
        return world
    if options.strategy != "usp":
        return 1
    inner = options.inner or next(size for size in range(isqrt(world), 0, -1) if world % size == 0)
    if world % inner:
        raise ShapeError(f"torch-ring: usp with inner = {inner} does not divide sp = {world}")
    return inner


def sequence_layout(options: AttentionOptions, seq_len: int, world: int) -> SequenceLayout:
    """The layout over the ranks; those that exchange heads count as one.

    Raises:
        ShapeError: the length does not divide over ranks and processes.
    """
    ranks = world // inner_ranks(options, world)
    layout = SequenceLayout(options.layout, ranks) if ranks > 1 or world == 1 else SequenceLayout("contiguous")
    layout.check(seq_len)
    if seq_len % world:
        raise ShapeError(f"torch-ring: a sequence of {seq_len} tokens does not divide over sp = {world} processes")
    return layout


def choose_kernel(
    options: AttentionOptions, device: torch.device, dtype: torch.dtype, head_dim: int
) -> tuple[str, tuple[str, ...]]:
    """The name of the kernel that options mean on ``device``, and where it was chosen, why.

    Raises:
        UnsupportedError: the named kernel cannot compute this here.
    """
    objections = {fused.name: fused.objection(device, dtype, head_dim) for fused in FUSED}
    if options.kernel != "auto":
        objection = objections.get(options.kernel, "")
        if objection:
            raise UnsupportedError(
                f"torch-ring: kernel {options.kernel!r} cannot be used: {objection}; use kernel = 'math' or 'auto'"
            )
        return options.kernel, ()
    name = next((name for name, objection in objections.items() if not objection), "math")
    others = (f"kernel {other}: {why}" for other, why in objections.items() if other != name)
    return name, (f"chose kernel {name}", *others, *_without_packs(name))


def _without_packs(name: str) -> Iterator[str]:
    """Why the documents of packed rows go to a kernel one by one that could take them at once."""
    for varlen in (fused.varlen for fused in FUSED if fused.name == name):
        if varlen is not None and varlen.objection():
            yield f"kernel {name} computes documents one by one: {varlen.objection()}"


def make_kernel(options: AttentionOptions, device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernel:
    """The kernel that options mean on ``device``; softmax scale ``1/sqrt(D)``. Raises as :func:`choose_kernel` does."""
    name, _ = choose_kernel(options, device, dtype, head_dim)
    scale = head_dim**-0.5
    fused = next((fused for fused in FUSED if fused.name == name), None)
    return MathKernel(scale, options.chunk) if fused is None else FlashKernel(scale, options.chunk, fused)


def attention_spec(
    options: AttentionOptions, peers: Neighbourhood, seq_len: int, mask: AttentionMask, kernel: Kernel
) -> AttentionSpec:
    """All that is static about attention over ``peers``; raises ShapeError where the length does not divide."""
    layout = sequence_layout(options, seq_len, peers.everyone.size)
    return AttentionSpec(
        strategy_of(options).movement, peers, layout, seq_len, mask, kernel, gather_heads=options.gather_heads
    )


def check_arrays(q: Tensor, k: Tensor, v: Tensor, segment_ids: Tensor | None, tokens: int) -> None:
    """Refuse shapes and dtypes that do not fit together, in words; ``tokens`` is C."""
    shapes = tuple(q.shape), tuple(k.shape), tuple(v.shape)
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ShapeError(
            "torch-ring: q {}, k {}, v {} do not fit; expected q [B,C,H,D] and k, v [B,C,K,D]".format(*shapes)
        )
    if q.shape[2] % k.shape[2]:
        raise ShapeError(f"torch-ring: {q.shape[2]} query heads are not a multiple of {k.shape[2]} key-value heads")
    if q.shape[1] != tokens:
        raise ShapeError(f"torch-ring: built for {tokens} tokens a process, got {q.shape[1]}; pass this rank's shard")
    if segment_ids is not None and segment_ids.shape != q.shape[:2]:
        raise ShapeError(f"torch-ring: segment_ids {tuple(segment_ids.shape)} must be [B,C] = {shapes[0][:2]}")
    if segment_ids is not None and (segment_ids.is_floating_point() or segment_ids.dtype == torch.bool):
        raise UnsupportedError(f"torch-ring: segment_ids is {segment_ids.dtype}; expected int32")
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.dtype not in DTYPES or array.dtype != q.dtype:
            raise UnsupportedError(
                f"torch-ring: {name} is {array.dtype}, q {q.dtype}; supported are float32 and bfloat16, one for all"
            )
        if array.device != q.device:
            raise UnsupportedError(f"torch-ring: {name} is on {array.device}, but q on {q.device}")
