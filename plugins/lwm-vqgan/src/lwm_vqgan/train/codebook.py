"""How the codebook follows the latents: k-means to begin with, running means after, new vectors for dead ones.

Shapes: N latents or codes, D the length of a vector; the codebook is [codes, D].
"""

from __future__ import annotations

import torch
from torch import Tensor

from lwm_vqgan.model.torch_vqgan import Codebook

_CHUNK = 4096  # latents compared with the codebook at once: 128 MiB of distances at 8192 codes


def k_means(latents: Tensor, codes: int, rounds: int, generator: torch.Generator) -> Tensor:
    """``codes`` centres of ``latents`` [N,D] by Lloyd's algorithm, begun at random latents.

    A centre that nothing is near to moves to a random latent.
    """
    order = torch.randperm(len(latents), generator=generator)
    picked = order[torch.arange(codes) % len(order)]
    centres = latents[picked].clone()
    if len(order) < codes:  # doubles would never part
        centres += 1e-4 * latents.std() * torch.randn(centres.shape, generator=generator)
    for _ in range(rounds):
        nearest = assign(latents, centres)
        counts = torch.bincount(nearest, minlength=codes).to(latents.dtype)
        sums = torch.zeros_like(centres).index_add_(0, nearest, latents)
        empty = counts == 0
        centres = sums / counts.clamp(min=1)[:, None]
        centres[empty] = latents[torch.randint(len(latents), (int(empty.sum()),), generator=generator)]
    return centres


def assign(latents: Tensor, centres: Tensor) -> Tensor:
    """The nearest of ``centres`` for each of ``latents`` [N,D] → int64 [N], with bounded memory."""
    book = Codebook(*centres.shape)
    book.embedding.weight = torch.nn.Parameter(centres, requires_grad=False)
    return torch.cat([book.nearest(part) for part in latents.split(_CHUNK)])


class RunningCodebook:
    """Moves each vector to the running mean of the latents that it is nearest to.

    (van den Oord et al. 2017, "Neural Discrete Representation Learning", appendix A.1.) It learns faster than a
    gradient where a step shows each code less than one latent on average.

    Args:
        codebook: what is moved, in place.
        decay: of the running count and sum of each code.
    """

    def __init__(self, codebook: Codebook, decay: float) -> None:
        self._codebook, self._decay = codebook, decay
        self.counts = torch.ones(codebook.embedding.num_embeddings)
        self.sums = codebook.embedding.weight.detach().clone()

    @torch.no_grad()
    def begin(self, centres: Tensor, latents_a_step: int) -> None:
        """Start from ``centres`` [codes, D], each as if used alike by the latents of a step."""
        self.counts.fill_(latents_a_step / len(centres))
        self.sums.copy_(centres * self.counts[:, None])
        self._codebook.embedding.weight.copy_(centres)

    @torch.no_grad()
    def follow(self, latents: Tensor, nearest: Tensor) -> None:
        """Move towards the latents [N,D] of a step and the codes [N] that were nearest to them."""
        counts = torch.bincount(nearest, minlength=len(self.counts)).to(latents.dtype)
        sums = torch.zeros_like(self.sums).index_add_(0, nearest, latents)
        self.counts.lerp_(counts, 1 - self._decay)
        self.sums.lerp_(sums, 1 - self._decay)
        self._codebook.embedding.weight.copy_(self.sums / self.counts.clamp(min=1e-6)[:, None])

    @torch.no_grad()
    def restart(self, latents: Tensor, below: float, generator: torch.Generator) -> int:
        """Give codes with less than ``below`` of the mean use a random latent of [N,D]; how many there were."""
        usual = float(self.counts.mean())
        dead = torch.nonzero(self.counts < below * usual).flatten()
        if len(dead):
            fresh = latents[torch.randint(len(latents), (len(dead),), generator=generator)]
            self.counts[dead] = usual
            self.sums[dead] = fresh * usual
            self._codebook.embedding.weight[dead] = fresh
        return len(dead)
