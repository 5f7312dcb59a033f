"""What a fused attention of a library is to the kernels.

Shapes: B rows, c queries and t keys of a tile, Q queries and T keys of a pack, H query heads, K key-value heads, D head
dim.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lwm_core.errors import UnsupportedError
from lwm_torch_ring.attention.tiles import Spans


class Varlen(Protocol):
    """Attention of sequences of many lengths, one after the other in the tensors; ``causal`` for square ones."""

    def objection(self) -> str:
        """Why it is not to be had; empty where it is."""
        ...

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """out ``[Q,H,D]`` and lse ``[Q,H]`` of ``q [Q,H,D]`` over ``k, v [T,K,D]``."""
        ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans, scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """dq, dk and dv."""
        ...


class Fused(Protocol):
    """Attention of one tile; ``[B,c,H,D]`` in and out, ``causal`` for square tiles.

    Attributes:
        name: as the option ``kernel`` has it.
        masks: whether it takes a bias.
        varlen: for the documents of packed rows.
    """

    name: ClassVar[str]
    masks: ClassVar[bool]
    varlen: ClassVar[Varlen | None]

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


def gpu_objection(device: torch.device, dtype: torch.dtype, head_dim: int, largest: int, least: tuple[int, int]) -> str:
    """Why a kernel of NVIDIA GPUs cannot compute this, whatever the library; empty where none is known.

    Args:
        largest: head dimension.
        least: compute capability.
    """
    if device.type != "cuda":
        return f"it needs an NVIDIA GPU, but the tensors are on {device.type}"
    if dtype != torch.bfloat16:
        return f"it computes in bfloat16, got {dtype}"
    if head_dim % 8 or head_dim > largest:
        return f"it takes head dimensions up to {largest} that 8 divides, got {head_dim}"
    if torch.cuda.get_device_capability(device) < least:
        return f"it needs a GPU of compute capability {least[0]}.{least[1]} or newer"
    return ""


def checked(name: str, lse: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``lse``, float32 and of the shape that it is known to have.

    Raises:
        UnsupportedError: it has another.
    """
    if tuple(lse.shape) != shape or lse.dtype != torch.float32:
        raise UnsupportedError(
            f"torch-ring: {name} gave lse {tuple(lse.shape)} {lse.dtype}, expected {shape} torch.float32; "
            "use another kernel"
        )
    return lse
