"""The block kernel for TPU, in Pallas: hops of ring attention, forward and backward.

:func:`forward` and :func:`backward` are one hop each, as pure functions of one rank's arrays. :class:`PallasTpuKernel`
is the same behind the seam of kernels: it keeps the running softmax, and dq, from hop to hop in the kernel's own form.
All may be called inside ``jit`` and, with ``check_vma=False``, inside ``shard_map``.
"""

from __future__ import annotations

from lwm_jax_ring.attention.kernels.pallas_tpu.kernel import PallasTpuKernel, backward, forward

__all__ = ["PallasTpuKernel", "backward", "forward"]
