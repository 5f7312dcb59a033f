"""FlashAttention-3 for Hopper GPUs, of the package ``flash_attn_interface`` where somebody installed it (arXiv
2407.08608): used by its private functions, which alone take an lse back; never needed.

They are looked up by the names of their arguments. What they take beyond those that are known here must have a default
or be optional, and is then left out. lse is natural-log float32, ``[B,H,c]``, or ``[H,Q]`` for many lengths; causal
masks begin at the bottom right, so that causal tiles are square here.

Shapes: B rows, c queries and t keys of a tile, Q queries and T keys of a pack, H query heads, K key-value heads, D head
dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lwm_torch_ring.attention.kernels.fused import Varlen, checked, gpu_objection
from lwm_torch_ring.attention.tiles import Spans

MODULE = "flash_attn_interface"

_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_FORWARD = {"q", "k", "v", "softmax_scale", "causal", *_LENGTHS}
_BACKWARD = {"dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv", "softmax_scale", *_LENGTHS}
_CAUSAL = ("causal", "is_causal")
_OPTIONAL = {
    "k_new", "v_new", "qv", "out", "out_", "cu_seqlens_k_new", "seqused_q", "seqused_k", "sequed_q", "sequed_k",
    "page_table", "kv_batch_idx", "leftpad_k", "rotary_cos", "rotary_sin", "seqlens_rotary", "q_descale", "k_descale",
    "v_descale", "max_seqlen_q", "max_seqlen_k", "cu_seqlens_q", "cu_seqlens_k",
}  # fmt: skip
"""Arguments of versions without defaults that may be None."""


class Call(NamedTuple):
    """One of its functions."""

    function: Callable[..., Any]
    rest: Mapping[str, None]  # arguments that must be given and may be None
    causal: str  # how it calls it

    def __call__(self, causal: bool, **given: Any) -> Any:
        return self.function(**{**self.rest, **given, self.causal: causal})


def _call(function: Any, needed: set[str]) -> Call | str:
    """A function by the names of its arguments, or in words why it is not the known one."""
    name = getattr(function, "__name__", str(function))
    operator = getattr(function, "_opoverload", None)
    if operator is not None:
        arguments = {argument.name: argument.has_default_value() for argument in operator._schema.arguments}
        name = operator._schema.name
    else:
        parameters = inspect.signature(function).parameters.values()
        arguments = {p.name: p.default is not p.empty for p in parameters if p.kind is not p.VAR_KEYWORD}
    causal = next((word for word in _CAUSAL if word in arguments), "")
    needed = {*(needed - {"causal"}), causal}
    rest = {word for word, default in arguments.items() if not default and word not in needed}
    lengths = {word for word in _LENGTHS if word in arguments and not arguments[word]}
    if not causal or not needed <= set(arguments) or not rest <= _OPTIONAL:
        return f"{MODULE} does not bind {name} as it is known"
    return Call(function, dict.fromkeys(sorted(rest | lengths)), causal)


@cache
def _calls() -> tuple[Call, Call] | str:
    """Forward and backward, or in words why there are none."""
    if find_spec(MODULE) is None:
        return f"{MODULE} is not installed"
    try:
        module = import_module(MODULE)
    except (ImportError, OSError) as error:
        return f"{MODULE} cannot be imported: {error}"
    found = []
    for name, needed in (("_flash_attn_forward", _FORWARD), ("_flash_attn_backward", _BACKWARD)):
        call = _call(getattr(module, name), needed) if hasattr(module, name) else f"{MODULE} has no {name}"
        if isinstance(call, str):
            return call
        found.append(call)
    return found[0], found[1]


def _bound() -> tuple[Call, Call]:
    calls = _calls()
    assert not isinstance(calls, str)  # else its objection has been heard
    return calls


def _gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool,
    **lengths: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv, which it writes into what it is given."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    _bound()[1](
        causal, dout=dout, q=q, k=k, v=v, out=out, softmax_lse=lse.contiguous(), dq=dq, dk=dk, dv=dv,
        softmax_scale=scale, **lengths,
    )  # fmt: skip
    return dq, dk, dv


def _lengths(spans: Spans) -> dict[str, Any]:
    return dict(zip(_LENGTHS, spans, strict=True))


@dataclass(frozen=True)
class Flash3Varlen:
    """Sequences of many lengths."""

    def objection(self) -> str:
        calls = _calls()
        return calls if isinstance(calls, str) else ""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        out, lse = _bound()[0](causal, q=q, k=k, v=v, softmax_scale=scale, **_lengths(spans))[:2]
        return out, checked("FlashAttention-3", lse, (q.shape[1], q.shape[0])).transpose(0, 1)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans, scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return _gradients(dout, q, k, v, out, lse.transpose(0, 1), scale, causal, **_lengths(spans))


@dataclass(frozen=True)
class Flash3:
    """See :class:`~lwm_torch_ring.attention.kernels.fused.Fused`; grouped heads natively."""

    name: ClassVar[str] = "flash-attn-3"
    masks: ClassVar[bool] = False
    varlen: ClassVar[Varlen | None] = Flash3Varlen()

    def objection(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
        why = gpu_objection(device, dtype, head_dim, 256, (9, 0))
        if not why and torch.cuda.get_device_capability(device)[0] != 9:
            why = "it needs a Hopper GPU, of compute capability 9.0"
        return why or Flash3Varlen().objection()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out, lse = _bound()[0](causal, q=q, k=k, v=v, softmax_scale=scale)[:2]
        rows, count, heads, _ = q.shape
        return out, checked("FlashAttention-3", lse, (rows, heads, count)).transpose(1, 2)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return _gradients(dout, q, k, v, out, lse.transpose(1, 2), scale, causal)
