"""The VQGAN in Flax (nnx), channels last; parameters are given by their canonical names.

Shapes: T frames, C channels, H × W pixels, h × w codes (h = H / f), D the length of a codebook vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from lwm_vqgan.model.config import VqganConfig
from lwm_vqgan.model.parameters import NORM_EPS, PIXEL_CHANNELS

_CANONICAL = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
"""Flax's name of a parameter → the canonical one."""


def _conv(inner: int, outer: int, rngs: nnx.Rngs, size: int = 3, **how: Any) -> nnx.Conv:
    return nnx.Conv(inner, outer, (size, size), rngs=rngs, precision=jax.lax.Precision.HIGHEST, **how)


def _norm(channels: int, groups: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
    # The two-pass variance, which Torch has too; the fast one loses digits where the mean is large.
    return nnx.GroupNorm(channels, groups, epsilon=NORM_EPS, use_fast_variance=False, rngs=rngs)


class ResnetBlock(nnx.Module):
    """``x + conv(silu(norm(conv(silu(norm(x))))))``, the ``x`` before the sum through a 1×1 where channels change."""

    def __init__(self, inner: int, outer: int, groups: int, rngs: nnx.Rngs) -> None:
        self.norm1 = _norm(inner, groups, rngs)
        self.conv1 = _conv(inner, outer, rngs)
        self.norm2 = _norm(outer, groups, rngs)
        self.conv2 = _conv(outer, outer, rngs)
        self.conv_shortcut = _conv(inner, outer, rngs, size=1) if inner != outer else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[T,H,W,C] → [T,H,W,C']."""
        hidden = self.conv1(jax.nn.silu(self.norm1(x)))
        hidden = self.conv2(jax.nn.silu(self.norm2(hidden)))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nnx.Module):
    """Halves height and width: one row and one column of zeros at the far ends, then a convolution of stride 2."""

    def __init__(self, channels: int, rngs: nnx.Rngs) -> None:
        self.conv = _conv(channels, channels, rngs, strides=2, padding="VALID")

    def __call__(self, x: jax.Array) -> jax.Array:
        """[T,H,W,C] → [T,H/2,W/2,C]."""
        return self.conv(jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0))))


class Upsample(nnx.Module):
    """Doubles height and width: each pixel four times, then a convolution."""

    def __init__(self, channels: int, rngs: nnx.Rngs) -> None:
        self.conv = _conv(channels, channels, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[T,H,W,C] → [T,2H,2W,C]."""
        return self.conv(x.repeat(2, axis=1).repeat(2, axis=2))


class Level(nnx.Module):
    """Residual blocks of one resolution, and the step to the next where there is one."""

    def __init__(
        self, inner: int, outer: int, count: int, groups: int, rngs: nnx.Rngs, step: type[nnx.Module] | None = None
    ) -> None:
        self.resnets = nnx.List(
            [ResnetBlock(inner if index == 0 else outer, outer, groups, rngs) for index in range(count)]
        )
        self.downsamplers = nnx.List([Downsample(outer, rngs)] if step is Downsample else [])
        self.upsamplers = nnx.List([Upsample(outer, rngs)] if step is Upsample else [])

    def __call__(self, x: jax.Array) -> jax.Array:
        """[T,H,W,C] → [T,H',W',C']."""
        for part in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = part(x)
        return x


class Encoder(nnx.Module):
    """Pixels to latents."""

    def __init__(self, config: VqganConfig, rngs: nnx.Rngs) -> None:
        channels, groups = config.channels, config.norm_groups
        before, last = (channels[0], *channels), len(channels) - 1
        self.conv_in = _conv(PIXEL_CHANNELS, channels[0], rngs)
        self.down_blocks = nnx.List(
            [
                Level(before[level], width, config.encoder_blocks, groups, rngs, Downsample if level < last else None)
                for level, width in enumerate(channels)
            ]
        )
        self.mid_block = Level(channels[-1], channels[-1], 2, groups, rngs)
        self.conv_norm_out = _norm(channels[-1], groups, rngs)
        self.conv_out = _conv(channels[-1], config.latent_channels, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[T,H,W,3] → [T,h,w,latent_channels]."""
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        x = self.mid_block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class Decoder(nnx.Module):
    """Latents to pixels."""

    def __init__(self, config: VqganConfig, rngs: nnx.Rngs) -> None:
        channels, groups = config.channels[::-1], config.norm_groups
        before, last = (channels[0], *channels), len(channels) - 1
        self.conv_in = _conv(config.latent_channels, channels[0], rngs)
        self.mid_block = Level(channels[0], channels[0], 2, groups, rngs)
        self.up_blocks = nnx.List(
            [
                Level(before[level], width, config.decoder_blocks, groups, rngs, Upsample if level < last else None)
                for level, width in enumerate(channels)
            ]
        )
        self.conv_norm_out = _norm(channels[-1], groups, rngs)
        self.conv_out = _conv(channels[-1], PIXEL_CHANNELS, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[T,h,w,latent_channels] → [T,H,W,3]."""
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class Codebook(nnx.Module):
    """The vectors that latents are rounded to."""

    def __init__(self, codes: int, dim: int, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Embed(codes, dim, rngs=rngs)

    def nearest(self, latents: jax.Array) -> jax.Array:
        """The nearest vector's number in L2, the lowest of equals: [..., D] → int32 [...].

        ``|z − e|² = |z|² − 2 z·e + |e|²``, of which ``|z|²`` is the same for every e and left out.
        """
        table = self.embedding.embedding[...]
        dots = jnp.matmul(latents, table.T, precision=jax.lax.Precision.HIGHEST)
        return jnp.argmin((table * table).sum(1) - 2.0 * dots, axis=-1).astype(jnp.int32)

    def __call__(self, codes: jax.Array) -> jax.Array:
        """int32 [...] → [..., D]."""
        return self.embedding(codes)


class FlaxVqgan(nnx.Module):
    """The whole model."""

    def __init__(self, config: VqganConfig, rngs: nnx.Rngs) -> None:
        self.encoder = Encoder(config, rngs)
        self.quant_conv = _conv(config.latent_channels, config.code_dim, rngs, size=1)
        self.quantize = Codebook(config.codes, config.code_dim, rngs)
        self.post_quant_conv = _conv(config.code_dim, config.latent_channels, rngs, size=1)
        self.decoder = Decoder(config, rngs)

    def latents(self, pixels: jax.Array) -> jax.Array:
        """Pixels in [−1, 1] [T,H,W,3] → latents [T,h,w,D], not yet rounded to the codebook."""
        return self.quant_conv(self.encoder(pixels))

    def pixels(self, latents: jax.Array) -> jax.Array:
        """Latents [T,h,w,D] → pixels [T,H,W,3], not clipped."""
        return self.decoder(self.post_quant_conv(latents))

    def encode(self, pixels: jax.Array) -> jax.Array:
        """Pixels in [−1, 1] [T,H,W,3] → codes int32 [T,h,w]."""
        return self.quantize.nearest(self.latents(pixels))

    def decode(self, codes: jax.Array) -> jax.Array:
        """Codes int32 [T,h,w] → pixels [T,H,W,3] in [−1, 1]."""
        return jnp.clip(self.pixels(self.quantize(codes)), -1.0, 1.0)


def abstract_vqgan(config: VqganConfig) -> FlaxVqgan:
    """The model with shapes in place of arrays: it takes no memory."""
    return nnx.eval_shape(lambda: FlaxVqgan(config, nnx.Rngs(0)))


def canonical_name(path: tuple[Any, ...]) -> str:
    """The canonical name of the parameter at ``path`` of the module tree."""
    *modules, last = map(str, path)
    return ".".join((*modules, _CANONICAL[last]))


def flax_vqgan(config: VqganConfig, parameters: Mapping[str, NDArray[Any]]) -> FlaxVqgan:
    """The model with ``parameters``, whose names and shapes are canonical, in float32."""
    graph, state = nnx.split(abstract_vqgan(config))

    def filled(path: tuple[Any, ...], variable: Any) -> Any:
        array = np.asarray(parameters[canonical_name(path)], np.float32)
        if array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)  # [out, in, height, width] → [height, width, in, out]
        return variable.replace(jnp.asarray(array))

    return nnx.merge(graph, nnx.map_state(filled, state))
