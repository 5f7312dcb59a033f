"""The loss in slices of the sequence: no array of B·S·V logits is ever made.

Loss = Σ over modalities m of α_m · (Σ w·ce over targets of m ÷ Σ w over targets of m); the softmax runs over the slice
of the target's modality only, which equals LWM's two heads.

Shapes: B batch, C tokens of a rank, E hidden size, V ids; M modalities.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lwm_core.vocab import Vocabulary


def modality_weights(targets: Tensor, weights: Tensor, vocabulary: Vocabulary) -> Tensor:
    """``[M]`` float64: Σ w over the targets of each modality of the vocabulary, in its order."""
    sums = [weights.double()[(targets >= ids.start) & (targets < ids.stop)].sum() for ids in vocabulary.slices.values()]
    return torch.stack(sums)


def modality_sums(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, slices: Sequence[slice], chunk: int
) -> Tensor:
    """``[len(slices)]`` float32: Σ w·ce over the targets of each modality.

    Args:
        hidden: ``[B,C,E]``; head: ``[V,E]``; targets: ``[B,C]``; weights: ``[B,C]`` float32.
        slices: the ids of each modality.
        chunk: tokens whose logits exist at a time; they are made again on the way back.
    """

    # Cut once, so that the gradients of a slice's chunks are added up in arrays of its own size.
    heads = [head[ids] for ids in slices]

    def part_sums(part: Tensor, part_targets: Tensor, part_weights: Tensor, *heads: Tensor) -> Tensor:
        sums = []
        for ids, rows in zip(slices, heads, strict=True):
            mine = (part_targets >= ids.start) & (part_targets < ids.stop)
            ce = -_log_likelihood(part, rows, part_targets, ids)
            sums.append(torch.where(mine, part_weights * ce, 0.0).sum())
        return torch.stack(sums)

    total = hidden.new_zeros(len(slices), dtype=torch.float32)
    flat = (hidden.flatten(0, 1), targets.flatten(), weights.flatten())
    for part, part_targets, part_weights in zip(*(x.split(chunk) for x in flat), strict=True):
        total = total + checkpoint(
            part_sums, part, part_targets, part_weights, *heads, use_reentrant=False, preserve_rng_state=False
        )
    return total


def log_likelihoods(hidden: Tensor, head: Tensor, targets: Tensor, slices: Sequence[slice], chunk: int) -> Tensor:
    """``[B,C]`` float32: natural-log probability of each target in the slice of its own modality."""
    flat_targets = targets.flatten()
    parts = []
    for part, part_targets in zip(hidden.flatten(0, 1).split(chunk), flat_targets.split(chunk), strict=True):
        result = part.new_zeros(len(part), dtype=torch.float32)
        for ids in slices:
            mine = (part_targets >= ids.start) & (part_targets < ids.stop)
            result = torch.where(mine, _log_likelihood(part, head[ids], part_targets, ids), result)
        parts.append(result)
    return torch.cat(parts).view(targets.shape)


def _log_likelihood(hidden: Tensor, rows: Tensor, targets: Tensor, ids: slice) -> Tensor:
    """``[N]`` float32 for ``hidden [N,E]`` and the head's ``rows`` of ``ids``; of other targets it means nothing."""
    logits = functional.linear(hidden, rows.to(hidden.dtype)).float()
    local = (targets - ids.start).clamp(0, ids.stop - ids.start - 1)
    return -functional.cross_entropy(logits, local.long(), reduction="none")
