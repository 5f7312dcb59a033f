"""The discriminator that judges patches (Isola et al. 2017, "Image-to-Image Translation", the 70 × 70 PatchGAN)."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

WIDTHS = (64, 128, 256)


class PatchDiscriminator(nn.Module):
    """One number a patch: above 0 where it seems real.

    GroupNorm stands where the paper has batch norm, so that a verdict does not depend on the other pictures.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, WIDTHS[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for before, width in pairwise(WIDTHS):
            layers += [
                nn.Conv2d(before, width, 4, stride=2, padding=1, bias=False),
                nn.GroupNorm(32, width),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(WIDTHS[-1], 1, 4, padding=1))

    def forward(self, pixels: Tensor) -> Tensor:
        """[B,3,H,W] in [−1, 1] → [B,1,h,w]."""
        return self.layers(pixels)
