"""The strategies by name, and what options mean for a mesh axis: its ranks, their layout, the kernel.

Shapes: B batch, S sequence, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

from jax.sharding import Mesh

from lwm_core.attention import AttentionMask
from lwm_core.errors import ShapeError, UnsupportedError
from lwm_core.layout import SequenceLayout
from lwm_jax_ring.attention.allgather import ALLGATHER
from lwm_jax_ring.attention.kernels.contract import Kernel
from lwm_jax_ring.attention.kernels.xla import XlaKernel, chunk_length
from lwm_jax_ring.attention.options import AttentionOptions
from lwm_jax_ring.attention.ring import RING
from lwm_jax_ring.attention.spec import AttentionSpec
from lwm_jax_ring.attention.ulysses import ULYSSES

DTYPES = ("float32", "bfloat16")

STRATEGIES = {"ring": RING, "allgather": ALLGATHER, "ulysses": ULYSSES, "usp": ULYSSES}


def inner_ranks(options: AttentionOptions, world: int) -> int:
    """Devices that exchange heads for tokens, of the ``world`` that hold the sequence.

    Raises:
        ShapeError: ``inner`` does not divide the world.
    """
    if options.strategy == "ulysses":
        return world
    if options.strategy != "usp":
        return 1
    inner = options.inner or next(size for size in range(isqrt(world), 0, -1) if world % size == 0)
    if world % inner:
        raise ShapeError(f"jax-ring: usp with inner = {inner} does not divide sp = {world}")
    return inner


def sequence_layout(options: AttentionOptions, seq_len: int, world: int) -> SequenceLayout:
    """The layout over the ranks; those that exchange heads count as one.

    Raises:
        ShapeError: the length does not divide over ranks and devices.
    """
    ranks = world // inner_ranks(options, world)
    layout = SequenceLayout(options.layout, ranks) if ranks > 1 or world == 1 else SequenceLayout("contiguous")
    layout.check(seq_len)
    if seq_len % world:
        raise ShapeError(f"jax-ring: a sequence of {seq_len} tokens does not divide over sp = {world} devices")
    return layout


def make_kernel(options: AttentionOptions, platform: str, run: int, head_dim: int) -> Kernel:
    """The kernel that the options name, for runs of ``run`` consecutive tokens on a device; scale ``1/sqrt(D)``.

    Raises:
        UnsupportedError: the kernel does not run on this platform.
    """
    scale, name = head_dim**-0.5, options.kernel
    if name == "auto":
        name = "pallas-tpu" if platform == "tpu" else "xla"
    if name == "xla":
        chunks = (chunk_length(run, chunk) for chunk in (options.query_chunk, options.key_chunk))
        return XlaKernel(scale, *chunks, softcap=options.softcap)
    if name == "cudnn":
        return fused_kernel(options, platform, run, scale)
    if platform != "tpu" and not options.interpret:
        raise UnsupportedError(
            f"jax-ring: kernel 'pallas-tpu' needs a TPU, but the devices are {platform}; use kernel = 'xla', or set "
            "interpret = true to try it slowly"
        )
    from lwm_jax_ring.attention.kernels.pallas_tpu import PallasTpuKernel

    return PallasTpuKernel(
        scale, head_dim, options.softcap, options.block_q, options.block_k, interpret=platform != "tpu"
    )


def fused_kernel(options: AttentionOptions, platform: str, run: int, scale: float) -> Kernel:
    """The kernel ``cudnn``, or its interpretation.

    Raises:
        UnsupportedError: no GPU, a soft-cap, or a JAX that binds cuDNN otherwise.
    """
    from lwm_jax_ring.attention.kernels.cudnn import CudnnFused, primitives
    from lwm_jax_ring.attention.kernels.fused import FusedKernel, InterpretedFused

    if options.softcap is not None:
        raise UnsupportedError("jax-ring: kernel 'cudnn' has no softcap; use kernel = 'xla'")
    on_gpu = platform in ("gpu", "cuda")
    if not on_gpu and not options.interpret:
        raise UnsupportedError(
            f"jax-ring: kernel 'cudnn' needs an NVIDIA GPU, but the devices are {platform}; use kernel = 'xla', or set "
            "interpret = true to try it slowly"
        )
    if on_gpu:
        primitives()
    block = chunk_length(run, options.fused_block)
    chunks = (chunk_length(block, chunk) for chunk in (options.query_chunk, options.key_chunk))
    return FusedKernel(scale, block, CudnnFused() if on_gpu else InterpretedFused(), XlaKernel(1.0, *chunks))


def attention_spec(
    options: AttentionOptions, mesh: Mesh, axis: str, seq_len: int, mask: AttentionMask, head_dim: int
) -> AttentionSpec:
    """All that is static about attention over the devices of mesh axis ``axis``.

    Raises:
        ShapeError: the length does not divide.
        UnsupportedError: the kernel does not run on these devices.
    """
    world = mesh.shape[axis]
    layout = sequence_layout(options, seq_len, world)
    run = seq_len // layout.world
    if layout.kind == "zigzag" and layout.world > 1:
        run //= 2
    kernel = make_kernel(options, mesh.devices.flat[0].platform, run, head_dim)
    return AttentionSpec(axis, layout, seq_len, mask, kernel, inner=world // layout.world)


def check_arrays(q: Any, k: Any, v: Any, segment_ids: Any | None, seq_len: int) -> None:
    """Refuse shapes and dtypes that do not fit together, in words."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ShapeError(
            f"jax-ring: q {q.shape}, k {k.shape}, v {v.shape} do not fit; expected q [B,S,H,D] and k, v [B,S,K,D]"
        )
    if q.shape[2] % k.shape[2]:
        raise ShapeError(f"jax-ring: {q.shape[2]} query heads are not a multiple of {k.shape[2]} key-value heads")
    if q.shape[1] != seq_len:
        raise ShapeError(f"jax-ring: built for sequences of {seq_len} tokens, got {q.shape[1]}")
    if segment_ids is not None and segment_ids.shape != q.shape[:2]:
        raise ShapeError(f"jax-ring: segment_ids {segment_ids.shape} must be [B,S] = {q.shape[:2]}")
    for name, array in (("q", q), ("k", k), ("v", v)):
        if str(array.dtype) not in DTYPES:
            raise UnsupportedError(f"jax-ring: {name} is {array.dtype}; supported are {' and '.join(DTYPES)}")
