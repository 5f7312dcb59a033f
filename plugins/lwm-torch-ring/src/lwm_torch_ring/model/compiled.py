"""A layer as one compiled program: what ``torch.compile`` makes of everything between two transfers of parameters.

Attention is one operator of it (``attention/differentiable.py``), and so is an exchange of heads, so that nothing
breaks the program; what FSDP does to a layer's parameters happens before and after it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lwm_core.errors import UnsupportedError


def compiled(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``layer`` compiled for the shapes that it is called with, whole or not at all.

    A call raises UnsupportedError where torch cannot compile it: no compiler on this host, for one.
    """
    # Of each program and rank it is said that rematerialised code must not compute in place, which ours does not.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    # Never in parts: a rematerialised layer with a break in it would not be compiled at all, and nothing would say so.
    program = torch.compile(layer, fullgraph=True, dynamic=False)

    def call(*given: Any) -> Tensor:
        try:
            return program(*given)
        except RuntimeError as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise  # of the layer itself, such as a rank that is lost
            told = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UnsupportedError(
                f"trainer 'torch': a layer cannot be compiled here ({told.strip()}); set trainer.compile to false",
                details=str(error),
            ) from error

    return call


def forget() -> None:
    """Drop all programs, which are for shapes that come no more."""
    torch.compiler.reset()
