"""The canonical names and shapes of the parameters, which both frameworks and all files agree on.

Names and layouts are those of diffusers' ``VQModel`` (as a language model's are Hugging Face Llama's): a
convolution's ``weight`` is [out, in, height, width], a GroupNorm has ``weight`` and ``bias`` [channels], the codebook
is ``quantize.embedding.weight`` [codes, code_dim]. ``down_blocks.0`` works at full resolution, ``up_blocks.0`` at
the codes'.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from lwm_vqgan.model.config import VqganConfig

Shape = tuple[int, ...]
CODEBOOK = "quantize.embedding.weight"
PIXEL_CHANNELS = 3
NORM_EPS = 1e-6
"""Epsilon of every GroupNorm, in diffusers as in flax."""


def parameter_shapes(config: VqganConfig) -> dict[str, Shape]:
    """Canonical name → shape, in the order in which data flows through the model."""
    return dict(_all(config))


def parameter_count(config: VqganConfig) -> int:
    """Scalars in all (LWM: 146,244,675)."""
    return sum(prod(shape) for shape in parameter_shapes(config).values())


def _all(config: VqganConfig) -> Iterator[tuple[str, Shape]]:
    channels, latent, dim = config.channels, config.latent_channels, config.code_dim
    deepest = channels[-1]
    yield from _conv("encoder.conv_in", PIXEL_CHANNELS, channels[0], 3)
    before = channels[0]
    for level, width in enumerate(channels):
        block = f"encoder.down_blocks.{level}"
        yield from _resnets(block, before, width, config.encoder_blocks)
        if level < len(channels) - 1:
            yield from _conv(f"{block}.downsamplers.0.conv", width, width, 3)
        before = width
    yield from _resnets("encoder.mid_block", deepest, deepest, 2)
    yield from _norm("encoder.conv_norm_out", deepest)
    yield from _conv("encoder.conv_out", deepest, latent, 3)
    yield from _conv("quant_conv", latent, dim, 1)
    yield CODEBOOK, (config.codes, dim)
    yield from _conv("post_quant_conv", dim, latent, 1)
    yield from _conv("decoder.conv_in", latent, deepest, 3)
    yield from _resnets("decoder.mid_block", deepest, deepest, 2)
    before = deepest
    for level, width in enumerate(reversed(channels)):
        block = f"decoder.up_blocks.{level}"
        yield from _resnets(block, before, width, config.decoder_blocks)
        if level < len(channels) - 1:
            yield from _conv(f"{block}.upsamplers.0.conv", width, width, 3)
        before = width
    yield from _norm("decoder.conv_norm_out", channels[0])
    yield from _conv("decoder.conv_out", channels[0], PIXEL_CHANNELS, 3)


def _resnets(block: str, before: int, width: int, count: int) -> Iterator[tuple[str, Shape]]:
    for index in range(count):
        name, inner = f"{block}.resnets.{index}", before if index == 0 else width
        yield from _norm(f"{name}.norm1", inner)
        yield from _conv(f"{name}.conv1", inner, width, 3)
        yield from _norm(f"{name}.norm2", width)
        yield from _conv(f"{name}.conv2", width, width, 3)
        if inner != width:
            yield from _conv(f"{name}.conv_shortcut", inner, width, 1)


def _conv(name: str, inner: int, outer: int, size: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (outer, inner, size, size)
    yield f"{name}.bias", (outer,)


def _norm(name: str, channels: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (channels,)
    yield f"{name}.bias", (channels,)
