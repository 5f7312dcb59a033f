"""The losses of a step, and their gradients, over micro-batches and ranks.

Shapes: A micro-batches, B rows of a data rank in one, C tokens of a sequence shard; M modalities of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from lwm_core.attention import AttentionMask
from lwm_core.vocab import Vocabulary
from lwm_torch_ring.model.llama import Llama
from lwm_torch_ring.model.loss import modality_sums, modality_weights
from lwm_torch_ring.train.stage import StageProgram

CAUSAL = AttentionMask("causal")
Arrays = Mapping[str, Tensor]
"""tokens, targets, segment_ids, positions, loss_weights of this rank; each ``[B,C]``."""


def over_ranks(values: Tensor) -> Tensor:
    """The sum of all ranks' values."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


@dataclass(frozen=True)
class Losses:
    """The loss of a model in a stage.

    Args:
        model: the network.
        program: its stage.
        vocabulary: whose modalities are told apart.
        alphas: weight of each modality's mean; 1 where none is given.
        chunk: tokens whose logits exist at a time.
        compile: whether the layers of a step with gradients are compiled.
    """

    model: Llama
    program: StageProgram
    vocabulary: Vocabulary
    alphas: Mapping[str, float]
    chunk: int
    compile: bool = False

    def run(self, batch: Sequence[Arrays], backward: bool) -> dict[str, float]:
        """The loss of micro-batches ``[A][B,C]`` and each modality's mean; with ``backward`` their gradients too.

        The denominators are those of all micro-batches and ranks, so that these equal one large batch on one rank.
        A modality without targets gives 0.
        """
        # Every token counts once: ranks of tp share their tokens out for the loss.
        mine = self.program.compute.tp.mine
        weights = over_ranks(
            torch.stack(
                [modality_weights(mine(one["targets"]), mine(one["loss_weights"]), self.vocabulary) for one in batch]
            ).sum(0)
        )
        present = [number for number, weight in enumerate(weights.tolist()) if weight > 0]
        names = list(self.vocabulary.slices)
        if not present:
            present = [names.index("text")]  # every rank takes its part in the step all the same
        slices = [self.vocabulary.slices[names[number]] for number in present]
        shares = torch.tensor([self.alphas.get(names[number], 1.0) for number in present]).to(weights)
        counted = weights[present]
        shares = torch.where(counted > 0, shares / counted.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
        total = torch.zeros(len(present), dtype=torch.float64, device=weights.device)
        for one in batch:
            sums = self._sums(one, slices, self.compile and backward)
            if backward:
                (sums * shares.float()).sum().backward()
            total += sums.detach()
        total = over_ranks(total)
        means = torch.where(counted > 0, total / counted.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
        found = dict.fromkeys((f"loss_{name}" for name in names), 0.0)
        found |= {f"loss_{names[number]}": float(mean) for number, mean in zip(present, means, strict=True)}
        return {"loss": float((total * shares).sum()), **found}

    def _sums(self, one: Arrays, slices: Sequence[slice], compiled: bool) -> Tensor:
        """``[len(slices)]`` float32: Σ w·ce of this rank's tokens of a micro-batch."""
        how = replace(self.program.compute, compile=compiled)
        backend, segments = self.program.backend, one["segment_ids"]

        def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
            out: Tensor = backend.attend(q, k, v, CAUSAL, segments)
            return out

        def tail(hidden: Tensor, head: Tensor) -> Tensor:
            targets, weights = how.tp.mine(one["targets"]), how.tp.mine(one["loss_weights"])
            return modality_sums(hidden, head, targets, weights, slices, self.chunk)

        sums: Tensor = self.model(one["tokens"], one["positions"], self.program.rope, attend, how, tail)
        return sums
