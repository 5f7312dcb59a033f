"""The worker for PyPI's ``ring-attention-pytorch`` 0.5.20: its own ring over gloo, on the path it has for CPUs.

A request says its ``bucket_size``, and whether tokens are ``striped``, which is how it balances causal work; they are
dealt as its module ``RingAttention`` deals them.

In this version the gradients of k and v are wrong on more than one rank: ``ring_pass`` gives back what arrived and what
was sent, and the backward pass takes the two for dk and dv. Here it is handed what arrived alone, with which they are
right; what is computed and sent stays the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from bench_torch_worker import Program, Subject, serve
from ring_attention_pytorch import ring_flash_attention as package
from torch import Tensor

_ring_pass = package.ring_pass


def arrived(*arguments: Any, **options: Any) -> Tensor:
    """``ring_pass`` as the backward pass of the package reads it."""
    tensor: Tensor = _ring_pass(*arguments, **options)[0]
    return tensor


package.ring_pass = arrived  # the forward pass and the keys' own way round do not go through this name


def make(case: dict[str, Any]) -> Subject:
    """``ring_flash_attn`` over ``world`` gloo processes."""
    world, rank = case["world"], case["rank"]

    def program(seq_len: int, how: Any) -> Program:
        bucket, striped, local = how["bucket_size"], how["striped"], seq_len // world
        if local % bucket:
            raise ValueError(f"ring-attention-pytorch: buckets of {bucket} do not divide {local} tokens a rank")
        places = np.arange(seq_len)
        if striped:
            places = places.reshape(bucket, -1).T.reshape(-1)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = package.ring_flash_attn(
                q, k, v, causal=True, bucket_size=bucket, ring_reduce_col=True, striped_ring_attn=striped,
                ring_size=world,
            )  # fmt: skip
            return out

        return Program(attend, places.reshape(world, -1)[rank])

    return Subject(program, ("ring-attention-pytorch", "einops", "numpy"))


if __name__ == "__main__":
    serve(make)
