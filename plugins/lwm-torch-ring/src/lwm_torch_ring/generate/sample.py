"""Drawing a token from logits.

Shapes: B rows, P pairs of rows, V ids.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lwm_core.protocols import SamplingSpec


def guide(logits: Tensor, scale: float) -> Tensor:
    """``u + scale·(c − u)``, classifier-free guidance (arXiv 2207.12598), of pairs c, u of rows.

    At 1 and 0 it is one of them to the bit, not to a rounding of the other.

    Args:
        logits: ``[2P,V]``, conditional and unconditional in turn.

    Returns:
        ``[P,V]``.
    """
    conditional, unconditional = logits[0::2], logits[1::2]
    if scale == 1.0:
        return conditional
    return unconditional if scale == 0.0 else unconditional + scale * (conditional - unconditional)


def sample(logits: Tensor, uniform: Tensor, sampling: SamplingSpec) -> Tensor:
    """Draw one id a row from ``logits [B,V]`` float32: greedy at temperature 0, else within top-k, top-p and min-p.

    Top-k comes first; top-p then keeps the smallest set of likeliest ids whose probability, at the given temperature,
    reaches it (arXiv 1904.09751); min-p those at least so many times as probable as the likeliest (arXiv 2407.01082),
    which is always kept.

    Args:
        uniform: ``[B]`` from [0, 1): the draw, by which the inverse of the distribution function gives the id.

    Returns:
        ``[B]`` int64.
    """
    if sampling.temperature == 0.0:
        return logits.argmax(dim=-1)
    logits = logits.double() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1.0:
        ordered = logits.sort(dim=-1, descending=True).values
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        kept = (before < sampling.top_p).sum(dim=-1, keepdim=True)
        logits = logits.masked_fill(logits < ordered.gather(-1, kept - 1), -torch.inf)
    if sampling.min_p > 0.0:
        logits = logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(sampling.min_p), -torch.inf)
    reached = logits.softmax(dim=-1).cumsum(dim=-1)
    drawn = torch.searchsorted(reached, (uniform.to(reached) * reached[:, -1])[:, None], right=True)[:, 0]
    # A draw at the very top of the sum must not fall on an id beyond the last that is possible.
    last = logits.shape[-1] - 1 - (logits > -torch.inf).flip(-1).int().argmax(dim=-1)
    return torch.minimum(drawn, last)
