"""The worker for the machine's ceiling: one process, all threads, ``scaled_dot_product_attention`` over everything."""

from __future__ import annotations

from typing import Any

import numpy as np
from bench_torch_worker import Program, Subject, serve
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by torch's flash attention for CPUs, and by nothing else."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(q, k, v, is_causal=True)


def make(_: dict[str, Any]) -> Subject:
    """Tokens in natural order; heads first in memory, with which this operator is fastest."""
    return Subject(lambda seq_len, how: Program(attend, np.arange(seq_len), heads_first=True), ("numpy",))


if __name__ == "__main__":
    serve(make)
