"""torch's own flash attention with its lse, forward and backward: all private names of torch that the plugin uses.

Each is looked up by name and by the names of its arguments, so that a torch that binds it otherwise is told apart.

Traps: the CPU op gives lse 0, not −inf, to a query whose keys are all masked, takes float masks alone, and its causal
mask begins at the top left; so does torch's, but FlashAttention-2's begins at the bottom right. Causal tiles are
square here.

Shapes: B rows, c queries and t keys of a tile, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

OLDEST = (2, 11)

_CPU = "_scaled_dot_product_flash_attention_for_cpu"
_CUDA = "_scaled_dot_product_flash_attention"
_BINDINGS = {
    _CPU: "query key value dropout_p is_causal attn_mask scale",
    f"{_CPU}_backward": "grad_out query key value out logsumexp dropout_p is_causal attn_mask scale",
    _CUDA: "query key value dropout_p is_causal return_debug_mask scale",
    f"{_CUDA}_backward": "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal "
    "philox_seed philox_offset scale",
}


@cache
def _op(name: str) -> Any:
    """The overload of ``aten::name``, or in words why this torch has none that is known here."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2] if part.isdigit())
    if version < OLDEST:
        return f"torch {torch.__version__} is older than {OLDEST[0]}.{OLDEST[1]}"
    op = getattr(getattr(torch.ops.aten, name, None), "default", None)
    if op is None or " ".join(argument.name for argument in op._schema.arguments) != _BINDINGS[name]:
        return f"torch {torch.__version__} does not bind aten::{name} as it is known"
    return op


def _unbound(name: str) -> str:
    """Why the op or its backward is not to be had; empty where both are."""
    return next((op for op in (_op(name), _op(f"{name}_backward")) if isinstance(op, str)), "")


class Fused(Protocol):
    """torch's attention for one device type; ``[B,c,H,D]`` in and out, ``causal`` for square tiles."""

    name: ClassVar[str]
    masks: ClassVar[bool]  # whether it takes a bias

    def objection(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
        """Why it cannot compute this; empty where it can."""
        ...

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """out ``[B,c,H,D]`` and lse ``[B,c,H]``; ``bias [c,t]`` float32 is added to the scores."""
        ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """dq, dk and dv."""
        ...


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

    def objection(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
        return _unbound(_CPU) if device.type == "cpu" else f"it needs a CPU, but the tensors are on {device.type}"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (x.float() for x in _turned(q, k, v))
        out, lse = _op(_CPU)(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
        return out.transpose(1, 2), lse.transpose(1, 2)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        given = (x.float() for x in _turned(dout, q, k, v, out, lse))
        dq, dk, dv = _turned(*_op(f"{_CPU}_backward")(*given, 0.0, causal, attn_mask=bias, scale=scale))
        return dq, dk, dv


@dataclass(frozen=True)
class CudaFlash:
    """``aten::_scaled_dot_product_flash_attention`` (FlashAttention-2); grouped heads natively; takes no bias."""

    name: ClassVar[str] = "cuda-flash"
    masks: ClassVar[bool] = False

    def objection(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
        if device.type != "cuda":
            return f"it needs an NVIDIA GPU, but the tensors are on {device.type}"
        if dtype != torch.bfloat16:
            return f"it computes in bfloat16, got {dtype}"
        if head_dim % 8 or head_dim > 256:
            return f"it takes head dimensions up to 256 that 8 divides, got {head_dim}"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "it needs a GPU of compute capability 8.0 or newer"
        return _unbound(_CUDA)

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
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of a dropout that there is none of
        dq, dk, dv = _op(f"{_CUDA}_backward")(
            *given, lse.transpose(1, 2).contiguous(), None, None, q.shape[1], k.shape[1], 0.0, causal,
            seed, seed[:1], scale=scale,
        )  # fmt: skip
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
