"""The VQGAN in Torch; its ``state_dict`` has the canonical names.

Shapes: T frames, C channels, H × W pixels, h × w codes (h = H / f), D the length of a codebook vector.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lwm_vqgan.model.config import VqganConfig
from lwm_vqgan.model.parameters import NORM_EPS, PIXEL_CHANNELS


class ResnetBlock(nn.Module):
    """``x + conv(silu(norm(conv(silu(norm(x))))))``, the ``x`` before the sum through a 1×1 where channels change."""

    def __init__(self, inner: int, outer: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inner, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outer, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        if inner != outer:
            self.conv_shortcut = nn.Conv2d(inner, outer, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[T,C,H,W] → [T,C',H,W]."""
        hidden = self.conv1(functional.silu(self.norm1(x)))
        hidden = self.conv2(functional.silu(self.norm2(hidden)))
        return hidden + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Downsample(nn.Module):
    """Halves height and width: one row and one column of zeros at the far ends, then a convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[T,C,H,W] → [T,C,H/2,W/2]."""
        return self.conv(functional.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width: each pixel four times, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[T,C,H,W] → [T,C,2H,2W]."""
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, and the step to the next where there is one."""

    def __init__(self, inner: int, outer: int, count: int, groups: int, step: type[nn.Module] | None = None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(inner if index == 0 else outer, outer, groups) for index in range(count)
        )
        if step is Downsample:
            self.downsamplers = nn.ModuleList([Downsample(outer)])
        elif step is Upsample:
            self.upsamplers = nn.ModuleList([Upsample(outer)])

    def forward(self, x: Tensor) -> Tensor:
        """[T,C,H,W] → [T,C',H',W']."""
        for module in self.children():
            for part in module:
                x = part(x)
        return x


class Encoder(nn.Module):
    """Pixels to latents."""

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        channels, groups = config.channels, config.norm_groups
        before, last = (channels[0], *channels), len(channels) - 1
        self.conv_in = nn.Conv2d(PIXEL_CHANNELS, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(before[level], width, config.encoder_blocks, groups, Downsample if level < last else None)
            for level, width in enumerate(channels)
        )
        self.mid_block = Level(channels[-1], channels[-1], 2, groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(channels[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[T,3,H,W] → [T,latent_channels,h,w]."""
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        x = self.mid_block(x)
        return self.conv_out(functional.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latents to pixels."""

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        channels, groups = config.channels[::-1], config.norm_groups
        before, last = (channels[0], *channels), len(channels) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = Level(channels[0], channels[0], 2, groups)
        self.up_blocks = nn.ModuleList(
            Level(before[level], width, config.decoder_blocks, groups, Upsample if level < last else None)
            for level, width in enumerate(channels)
        )
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(channels[-1], PIXEL_CHANNELS, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[T,latent_channels,h,w] → [T,3,H,W]."""
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(functional.silu(self.conv_norm_out(x)))


class Codebook(nn.Module):
    """The vectors that latents are rounded to."""

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, dim)

    def nearest(self, latents: Tensor) -> Tensor:
        """The nearest vector's number in L2, the lowest of equals: [..., D] → int64 [...].

        ``|z − e|² = |z|² − 2 z·e + |e|²``, of which ``|z|²`` is the same for every e and left out.
        """
        table = self.embedding.weight
        flat = latents.reshape(-1, table.shape[1])
        distance = torch.addmm((table * table).sum(1), flat, table.T, alpha=-2.0)
        return distance.argmin(1).reshape(latents.shape[:-1])

    def forward(self, codes: Tensor) -> Tensor:
        """int64 [...] → [..., D]."""
        return self.embedding(codes)


class TorchVqgan(nn.Module):
    """The whole model."""

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_dim, 1)
        self.quantize = Codebook(config.codes, config.code_dim)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.latent_channels, 1)
        self.decoder = Decoder(config)

    @torch.no_grad()
    def begin(self) -> None:
        """Fresh weights for training: convolutions that keep the variance, residual blocks that begin as the identity.

        So the untrained model is a short stack of convolutions, which learns to pass pixels through in few steps.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResnetBlock):
                nn.init.zeros_(module.conv2.weight)

    def latents(self, pixels: Tensor) -> Tensor:
        """Pixels in [−1, 1] [T,3,H,W] → latents [T,h,w,D], not yet rounded to the codebook."""
        return self.quant_conv(self.encoder(pixels)).permute(0, 2, 3, 1)

    def pixels(self, latents: Tensor) -> Tensor:
        """Latents [T,h,w,D] → pixels [T,3,H,W], not clipped."""
        return self.decoder(self.post_quant_conv(latents.permute(0, 3, 1, 2)))

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels in [−1, 1] [T,3,H,W] → codes int64 [T,h,w]."""
        return self.quantize.nearest(self.latents(pixels))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes int64 [T,h,w] → pixels [T,3,H,W] in [−1, 1]."""
        return self.pixels(self.quantize(codes)).clamp(-1.0, 1.0)
