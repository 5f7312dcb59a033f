"""torch's own fused attention with its lse, forward and backward: all private names of torch that the plugin uses.

Each is looked up by name and by the names of its arguments, so that a torch that binds it otherwise is told apart.

Traps:
- The CPU op gives lse 0, not −inf, to a query whose keys are all masked, and takes float masks alone.
- A causal mask of the CPU op and of cuDNN begins at the top left, FlashAttention-2's at the bottom right: causal tiles
  are square here, in packs too.
- The varlen op, told that no sequence has more than one query, gives grouped heads' lse in another order: it is told
  of two at least, which is a bound only.
- cuDNN's lse has a last dimension of 1 in some versions of torch and none in others: the backward pass is given what
  the forward pass gives.
- torch keeps cuDNN's plans by shapes and by strides of q, k and v alone, so that out and dout of other strides would be
  misread: all five are contiguous here.
- cuDNN makes a plan for every shape, which takes longer than a tile does: odd shapes go to FlashAttention-2.

Shapes: B rows, c queries and t keys of a tile, Q queries and T keys of a pack, H query heads, K key-value heads, D head
dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from lwm_torch_ring.attention.kernels.fused import Varlen, checked, gpu_objection
from lwm_torch_ring.attention.tiles import Spans

OLDEST = (2, 11)
OLDEST_CUDNN = 90_100

_CPU = "_scaled_dot_product_flash_attention_for_cpu"
_CUDA = "_scaled_dot_product_flash_attention"
_CUDNN = "_scaled_dot_product_cudnn_attention"
_VARLEN = "_flash_attention"
_VARLEN_FORWARD = (
    "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask scale window_size_left "
    "window_size_right seqused_k alibi_slopes"
)
_VARLEN_BACKWARD = "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal"
_BINDINGS: dict[str, tuple[str, ...]] = {
    _CPU: ("query key value dropout_p is_causal attn_mask scale",),
    f"{_CPU}_backward": ("grad_out query key value out logsumexp dropout_p is_causal attn_mask scale",),
    _CUDA: ("query key value dropout_p is_causal return_debug_mask scale",),
    f"{_CUDA}_backward": (
        "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal philox_seed "
        "philox_offset scale",
    ),
    _CUDNN: ("query key value attn_bias compute_log_sumexp dropout_p is_causal return_debug_mask scale",),
    f"{_CUDNN}_backward": (
        "grad_out query key value out logsumexp philox_seed philox_offset attn_bias cum_seq_q cum_seq_k max_q max_k "
        "dropout_p is_causal scale",
    ),
    f"{_VARLEN}_forward": (
        _VARLEN_FORWARD, f"{_VARLEN_FORWARD} block_table", f"{_VARLEN_FORWARD} block_table num_splits"
    ),
    f"{_VARLEN}_backward": tuple(
        f"{_VARLEN_BACKWARD} {state} scale window_size_left window_size_right"
        for state in ("rng_state unused", "philox_seed philox_offset")
    ),
}  # fmt: skip


@cache
def _op(name: str) -> Any:
    """The overload of ``aten::name``, or in words why this torch has none that is known here."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2] if part.isdigit())
    if version < OLDEST:
        return f"torch {torch.__version__} is older than {OLDEST[0]}.{OLDEST[1]}"
    op = getattr(getattr(torch.ops.aten, name, None), "default", None)
    if op is None or " ".join(argument.name for argument in op._schema.arguments) not in _BINDINGS[name]:
        return f"torch {torch.__version__} does not bind aten::{name} as it is known"
    return op


def _unbound(forward: str, backward: str) -> str:
    """Why the op or its backward is not to be had; empty where both are."""
    return next((op for op in (_op(forward), _op(backward)) if isinstance(op, str)), "")


def _turned(*tensors: Tensor) -> list[Tensor]:
    """``[B,c,H,D]`` ↔ ``[B,H,c,D]``, as views."""
    return [x.transpose(1, 2) for x in tensors]


@dataclass(frozen=True)
class CpuFlash:
    """``aten::_scaled_dot_product_flash_attention_for_cpu``; grouped heads natively. Computes in float32.

    bfloat16 is widened first: the op would round what it gives, and a ring adds up the results of many tiles.
    """

    name: ClassVar[str] = "cpu-flash"
    masks: ClassVar[bool] = True
    varlen: ClassVar[Varlen | None] = None

    def objection(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
        if device.type != "cpu":
            return f"it needs a CPU, but the tensors are on {device.type}"
        return _unbound(_CPU, f"{_CPU}_backward")

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out, lse = self.by_heads(*_turned(q, k, v), scale, causal, bias)
        return out.transpose(1, 2), lse.transpose(1, 2)

    def by_heads(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """out ``[B,H,c,D]`` and lse ``[B,H,c]`` float32 of ``q [B,H,c,D]``, ``k, v [B,K,t,D]``."""
        out, lse = _op(_CPU)(q.float(), k.float(), v.float(), 0.0, causal, attn_mask=bias, scale=scale)
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        given = (x.float() for x in _turned(dout, q, k, v, out, lse))
        dq, dk, dv = _turned(*_op(f"{_CPU}_backward")(*given, 0.0, causal, attn_mask=bias, scale=scale))
        return dq, dk, dv


def _no_seed(device: torch.device) -> tuple[Tensor, Tensor]:
    """The random state of a dropout that there is none of."""
    seed = torch.zeros(2, dtype=torch.uint64, device=device)
    return seed, seed[:1]


@dataclass(frozen=True)
class CudaVarlen:
    """``aten::_flash_attention_forward`` and ``_backward`` (FlashAttention-2) over sequences of many lengths."""

    def objection(self) -> str:
        return _unbound(f"{_VARLEN}_forward", f"{_VARLEN}_backward")

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        longest = max(2, spans.longest_q), spans.longest_k
        out, lse = _op(f"{_VARLEN}_forward")(q, k, v, spans.q, spans.k, *longest, 0.0, causal, False, scale=scale)[:2]
        return out, checked("FlashAttention-2", lse, (q.shape[1], q.shape[0])).transpose(0, 1)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans, scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        dq, dk, dv = _op(f"{_VARLEN}_backward")(
            dout, q, k, v, out, lse.transpose(0, 1).contiguous(), spans.q, spans.k, max(2, spans.longest_q),
            spans.longest_k, 0.0, causal, *_no_seed(q.device), scale=scale,
        )  # fmt: skip
        return dq, dk, dv


@dataclass(frozen=True)
class CudaFlash:
    """``aten::_scaled_dot_product_flash_attention`` (FlashAttention-2); grouped heads natively; takes no bias."""

    name: ClassVar[str] = "cuda-flash"
    masks: ClassVar[bool] = False
    varlen: ClassVar[Varlen | None] = CudaVarlen()

    def objection(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
        return gpu_objection(device, dtype, head_dim, 256, (8, 0)) or _unbound(_CUDA, f"{_CUDA}_backward")

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out, lse = _op(_CUDA)(*_turned(q, k, v), 0.0, causal, False, scale=scale)[:2]
        return out.transpose(1, 2), lse.transpose(1, 2)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        given = _turned(dout, q, k, v, out)
        dq, dk, dv = _op(f"{_CUDA}_backward")(
            *given, lse.transpose(1, 2).contiguous(), None, None, q.shape[1], k.shape[1], 0.0, causal,
            *_no_seed(q.device), scale=scale,
        )  # fmt: skip
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


@cache
def _lse_dims(device: torch.device) -> int:
    """How many dimensions cuDNN's lse has in this torch, seen from a small call."""
    x = torch.zeros(1, 1, 128, 64, dtype=torch.bfloat16, device=device)
    return int(_op(_CUDNN)(x, x, x, None, True, 0.0, False, False, scale=1.0)[1].ndim)


@dataclass(frozen=True)
class Cudnn:
    """``aten::_scaled_dot_product_cudnn_attention``; grouped heads natively, as torch's own dispatch passes them.

    Args:
        grain: tokens that divide both sides of the tiles that cuDNN gets; others go to ``odd``, and so do documents.
    """

    grain: int = 128
    odd: CudaFlash = CudaFlash()
    name: ClassVar[str] = "cudnn"
    masks: ClassVar[bool] = False
    varlen: ClassVar[Varlen | None] = CudaFlash.varlen

    def objection(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
        why = gpu_objection(device, dtype, head_dim, 128, (9, 0))
        why = why or _unbound(_CUDNN, f"{_CUDNN}_backward") or self.odd.objection(device, dtype, head_dim)
        if why:
            return why
        if not torch.backends.cuda.cudnn_sdp_enabled():
            return "torch.backends.cuda.enable_cudnn_sdp(False) turned it off"
        if (torch.backends.cudnn.version() or 0) < OLDEST_CUDNN:
            return f"it needs cuDNN {OLDEST_CUDNN} or newer, torch has {torch.backends.cudnn.version()}"
        if torch.are_deterministic_algorithms_enabled():
            return "its gradients differ from run to run, which torch.use_deterministic_algorithms rules out"
        return ""

    def _takes(self, q: Tensor, k: Tensor) -> bool:
        return q.shape[1] % self.grain == 0 and k.shape[1] % self.grain == 0

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if not self._takes(q, k):
            return self.odd.forward(q, k, v, scale, causal, bias)
        given = _turned(*(x.contiguous() for x in (q, k, v)))
        out, lse = _op(_CUDNN)(*given, None, True, 0.0, causal, False, scale=scale)[:2]
        lse = lse.squeeze(3) if lse.ndim == 4 else lse
        rows, count, heads, _ = q.shape
        return out.transpose(1, 2), checked("cuDNN", lse, (rows, heads, count)).transpose(1, 2)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        if not self._takes(q, k):
            return self.odd.backward(dout, q, k, v, out, lse, scale, causal, bias)
        given = _turned(*(x.contiguous() for x in (dout, q, k, v, out)))
        lse = lse.transpose(1, 2).contiguous()
        lse = lse[..., None] if _lse_dims(q.device) == 4 else lse
        seed = torch.zeros((), dtype=torch.int64, device=q.device)  # of a dropout that there is none of
        dq, dk, dv = _op(f"{_CUDNN}_backward")(
            *given, lse, seed, seed, None, None, None, q.shape[1], k.shape[1], 0.0, causal, scale=scale
        )
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
