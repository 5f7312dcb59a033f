"""The Pallas TPU kernel as a strategy sees it.

Shapes: B batch, C queries, T keys, H query heads, K key-value heads, D head dim; R is 1 or B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from lwm_core.errors import ShapeError
from lwm_jax_ring.attention.blocks import Keys, Queries
from lwm_jax_ring.attention.kernels.contract import not_differentiable, row_sums
from lwm_jax_ring.attention.kernels.pallas_tpu import backward_pass, forward_pass, plan
from lwm_jax_ring.attention.kernels.pallas_tpu.inside import Logits


@dataclass(frozen=True)
class PallasTpuKernel:
    """See :class:`~lwm_jax_ring.attention.kernels.contract.Kernel`.

    Args:
        scale: the softmax scale, positive.
        dim: head dim D.
        softcap: logits become ``softcap · tanh(logits / softcap)``; None leaves them alone.
        block_q, block_k: largest blocks, multiples of 128; shorter ones are taken where they pad less. None: 1024 for
            bfloat16 heads of up to 128, else 512, which fit the 16 MiB of VMEM that a kernel has on TPU v4.
        interpret: as of ``pallas_call``: True runs the kernel on any device, slowly.

    Raises:
        ShapeError: scale, softcap, blocks or shapes that cannot be.
        UnsupportedError: a dtype other than bfloat16 and float32 or more than one of them, a head dim over 256, or
            more pairs of blocks than the scalar memory of a core can list.
    """

    scale: float
    dim: int
    softcap: float | None = None
    block_q: int | None = None
    block_k: int | None = None
    interpret: Any = False

    def __post_init__(self) -> None:
        Logits(self.scale, self.softcap)

    @property
    def static(self) -> tuple[Logits, int | None, int | None, Any]:
        """What both passes are given beside arrays."""
        return Logits(self.scale, self.softcap), self.block_q, self.block_k, self.interpret

    def queries(self, q: jax.Array, mask: Queries, kv_heads: int) -> plan.Prepared:
        return plan.prepare(q, mask, self.block_q)

    def start(self, queries: plan.Prepared) -> forward_pass.State:
        return forward_pass.start(queries)

    def absorb(
        self, state: forward_pass.State, queries: plan.Prepared, k: jax.Array, v: jax.Array, keys: Keys
    ) -> forward_pass.State:
        return _absorb(self, state, queries, k, v, keys)

    def finish(self, state: forward_pass.State, length: int) -> tuple[jax.Array, jax.Array]:
        return forward_pass.finish(state, length, self.dim, self.static[0])

    def saved(
        self, q: jax.Array, out: jax.Array, dout: jax.Array, lse: jax.Array, mask: Queries, kv_heads: int
    ) -> backward_pass.Saved:
        if out.shape != q.shape or dout.shape != q.shape or lse.shape != q.shape[:3]:
            raise ShapeError(
                f"pallas-tpu: q is {q.shape}, out {out.shape}, dout {dout.shape}, lse {lse.shape}; "
                "expected [B,C,H,D] three times and [B,C,H]"
            )
        return backward_pass.save(plan.prepare(q, mask, self.block_q), dout, lse, row_sums(out, dout))

    def start_gradient(self, saved: backward_pass.Saved) -> jax.Array:
        return backward_pass.start(saved)

    def gradients(
        self, dq: jax.Array, saved: backward_pass.Saved, k: jax.Array, v: jax.Array, keys: Keys
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        return _gradients(self, dq, saved, k, v, keys)

    def finish_gradient(self, dq: jax.Array, length: int) -> jax.Array:
        return backward_pass.finish(dq, length, self.dim, self.static[0])


def _forward_hop(kernel: PallasTpuKernel, *arrays: Any) -> forward_pass.State:
    return forward_pass.absorb(*arrays, *kernel.static)


def _backward_hop(kernel: PallasTpuKernel, *arrays: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    return backward_pass.absorb(*arrays, *kernel.static)


_absorb = not_differentiable(_forward_hop, "pallas-tpu", (0,))
_gradients = not_differentiable(_backward_hop, "pallas-tpu", (0,))


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, queries: Queries, keys: Keys, *, scale: float, **options: Any
) -> tuple[jax.Array, jax.Array]:
    """Attention of one rank's queries over one rank's keys.

    Args:
        q: ``[B,C,H,D]`` bfloat16 or float32, not scaled.
        k, v: ``[B,T,K,D]`` in q's dtype; H is a multiple of K. C and T are free: what no block divides is padded here.
        queries: ``low`` and ``high`` ``[R,C]``, ``segments [B,C]`` or None.
        keys: ``index [T]``, −1 for a key that nobody sees; ``segments [B,T]`` or None, as for the queries.
        scale, options: arguments of :class:`PallasTpuKernel`.

    Returns:
        out ``[B,C,H,D]`` and natural-log lse ``[B,C,H]``, both float32; 0 and −inf where a query sees nothing.

    Raises:
        ShapeError, UnsupportedError: as :class:`PallasTpuKernel`.
    """
    kernel = PallasTpuKernel(float(scale), q.shape[3], **options)
    prepared = kernel.queries(q, queries, k.shape[2])
    return kernel.finish(kernel.absorb(kernel.start(prepared), prepared, k, v, keys), q.shape[1])


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out: jax.Array,
    dout: jax.Array,
    lse: jax.Array,
    queries: Queries,
    keys: Keys,
    *,
    scale: float,
    **options: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The share of one rank's keys in the gradients of attention over the keys of all ranks.

    Args:
        q, k, v, queries, keys, scale, options: as of :func:`forward`.
        out: ``[B,C,H,D]``, of all ranks' keys together.
        dout: ``[B,C,H,D]``, gradient of out; used in q's dtype.
        lse: ``[B,C,H]`` natural log, of all ranks' keys together; −inf or +inf where a query sees nothing.

    Returns:
        dq ``[B,C,H,D]``, dk and dv ``[B,T,K,D]``, float32, summed over the heads of a group; with respect to the
        unscaled q, k and v. 0 for a query that sees nothing and for a key that nobody sees.

    Raises:
        ShapeError, UnsupportedError: as :class:`PallasTpuKernel`.
    """
    kernel = PallasTpuKernel(float(scale), q.shape[3], **options)
    saved = kernel.saved(q, out, dout, lse, queries, k.shape[2])
    dq, dk, dv = kernel.gradients(kernel.start_gradient(saved), saved, k, v, keys)
    return kernel.finish_gradient(dq, q.shape[1]), dk, dv
