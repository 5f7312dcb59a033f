"""The model: parameters as counted, alike in Torch and Flax, and the same as diffusers'."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from flax import nnx
from numpy.typing import NDArray
from pydantic import ValidationError

from lwm_core.testing.tolerance import assert_close
from lwm_vqgan.model.config import VqganConfig
from lwm_vqgan.model.flax_vqgan import FlaxVqgan, abstract_vqgan, canonical_name, flax_vqgan
from lwm_vqgan.model.parameters import parameter_count, parameter_shapes
from lwm_vqgan.model.torch_runner import torch_vqgan
from lwm_vqgan.model.torch_vqgan import TorchVqgan
from lwm_vqgan.weights.folder import VqganWeights

LWM = VqganConfig()
LWM_PARAMETERS = 146_244_675
SHIPPED_SHAPE = VqganConfig(
    frame_size=64, base_channels=16, channel_multipliers=(1, 2, 4), encoder_blocks=1, decoder_blocks=1,
    latent_channels=32, code_dim=8, norm_groups=4,
)  # fmt: skip

Random = Callable[..., VqganWeights]


def pixels(config: VqganConfig, frames: int, seed: int = 1) -> NDArray[np.float32]:
    """Noise in [−1, 1], smooth in half of the frames: [T,H,W,3]."""
    random = np.random.default_rng(seed)
    noise = random.uniform(-1, 1, (frames, config.frame_size, config.frame_size, 3))
    noise[::2] = noise[::2].cumsum(axis=1).cumsum(axis=2) / config.frame_size
    return np.clip(noise, -1, 1).astype(np.float32)


def in_torch(weights: VqganWeights, x: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Latents, codes, and the pixels of the codes, channels last."""
    model = torch_vqgan(weights)
    with torch.inference_mode():
        given = torch.from_numpy(x).permute(0, 3, 1, 2)
        codes = model.encode(given)
        made = model.decode(codes).permute(0, 2, 3, 1)
        return model.latents(given).numpy(), codes.numpy(), made.numpy()


def in_flax(weights: VqganWeights, x: NDArray[np.float32], codes: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """Latents and codes of ``x``, and the pixels of ``codes``; one compilation for all."""

    @nnx.jit
    def run(model: FlaxVqgan, x: Any, codes: Any) -> tuple[Any, ...]:
        latents = model.latents(x)
        return latents, model.quantize.nearest(latents), model.decode(codes)

    return tuple(map(np.asarray, run(flax_vqgan(weights.config, weights.parameters), x, codes)))


def test_parameters_are_lwms() -> None:
    assert parameter_count(LWM) == LWM_PARAMETERS
    assert (LWM.downsample, LWM.grid, LWM.codes_per_frame) == (16, 16, 256)
    with torch.device("meta"):
        own = {name: tuple(tensor.shape) for name, tensor in TorchVqgan(LWM).state_dict().items()}
    assert own == parameter_shapes(LWM)
    leaves = nnx.to_flat_state(nnx.state(abstract_vqgan(LWM)))
    assert sum(prod(leaf.get_value().shape) for _, leaf in leaves) == LWM_PARAMETERS
    assert {canonical_name(path) for path, _ in leaves} == set(own)


def test_names_and_shapes_are_diffusers_own() -> None:
    with torch.device("meta"):
        theirs = {name: tuple(tensor.shape) for name, tensor in diffusers_model(LWM).state_dict().items()}
    assert theirs == parameter_shapes(LWM)


def diffusers_model(config: VqganConfig) -> Any:
    """diffusers' ``VQModel`` of ``config``, random."""
    from diffusers import VQModel

    levels = len(config.channels)
    return VQModel(
        block_out_channels=list(config.channels), layers_per_block=config.encoder_blocks, act_fn="silu",
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
        latent_channels=config.latent_channels, vq_embed_dim=config.code_dim, num_vq_embeddings=config.codes,
        norm_num_groups=config.norm_groups, mid_block_add_attention=False, lookup_from_codebook=True,
    )  # fmt: skip


@pytest.mark.parametrize("config", [None, SHIPPED_SHAPE], ids=["narrow", "the shipped shape"])
def test_flax_and_torch_agree(config: VqganConfig | None, small: VqganConfig, random_vqgan: Random) -> None:
    weights = random_vqgan(config or small)
    x = pixels(weights.config, 6)
    latents, codes, made = in_torch(weights, x)
    own_latents, own_codes, own_made = in_flax(weights, x, codes)
    assert_close(own_latents, latents, 1e-4, "latents")
    assert np.mean(own_codes == codes) >= 0.999
    assert_close(own_made, made, 1e-4, "pixels")
    assert len(np.unique(codes)) > 20 and codes.shape == (6, weights.config.grid, weights.config.grid)


def test_codes_are_the_nearest_in_l2(small: VqganConfig, random_vqgan: Random) -> None:
    weights = random_vqgan(small)
    latents, codes, _ = in_torch(weights, pixels(small, 3))
    table = weights.parameter("quantize.embedding.weight").astype(np.float64)
    distance = np.linalg.norm(latents[..., None, :].astype(np.float64) - table, axis=-1)
    chosen = np.take_along_axis(distance, codes[..., None], -1)[..., 0]
    assert np.all(chosen <= distance.min(-1) + 1e-5)


@pytest.mark.parametrize("level", range(3))
def test_each_level_halves_the_size(level: int, random_vqgan: Random) -> None:
    config = VqganConfig(
        frame_size=16 << level, base_channels=4, channel_multipliers=(1,) * (level + 1), latent_channels=4, code_dim=4,
        codes=50, norm_groups=1,
    )  # fmt: skip
    x = pixels(config, 2)
    latents, codes, made = in_torch(random_vqgan(config), x)
    assert latents.shape == (2, 16, 16, 4) and codes.shape == (2, 16, 16) and made.shape == x.shape
    assert np.abs(made).max() <= 1.0


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"frame_size": 100}, "does not divide by 16"),
        ({"norm_groups": 48}, "does not divide the 128 channels"),
        ({"channel_multipliers": (1, 0)}, "whole numbers from 1"),
        ({"attention": True}, "Extra inputs"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        VqganConfig(**values)


def compare_with_diffusers(config: VqganConfig, frames: int, folder: Any, flax_too: bool) -> None:
    """A random ``VQModel``, saved and read by us, gives the same codes and pixels."""
    from lwm_vqgan.weights.diffusers_form import read_diffusers

    torch.manual_seed(0)
    theirs = diffusers_model(config).eval()
    torch.nn.init.normal_(theirs.quantize.embedding.weight, std=0.2)  # as drawn by diffusers, all are nearly 0
    x = pixels(config, frames)
    with torch.inference_mode():
        latents = theirs.encode(torch.from_numpy(x).permute(0, 3, 1, 2)).latents
        _, _, (_, _, indices) = theirs.quantize(latents)
        # From the codes: from latents it adds z and subtracts it again, which rounds where z is large.
        shape = (frames, config.grid, config.grid, config.code_dim)
        made = theirs.decode(indices, force_not_quantize=True, shape=shape).sample
        made = made.permute(0, 2, 3, 1).clamp(-1, 1).numpy()
    theirs.save_pretrained(folder)
    weights = read_diffusers(folder)
    assert weights.config == config
    codes = indices.reshape(frames, config.grid, config.grid).numpy()
    _, own_codes, own_made = in_torch(weights, x)
    assert np.mean(own_codes == codes) >= 0.999 and len(np.unique(codes)) > 10
    same = (own_codes == codes).all(axis=(1, 2))  # a frame with another code has other pixels
    assert same.any()
    assert_close(own_made[same], made[same], 1e-4, "pixels")  # ours run channels last, and sum in another order
    if flax_too:
        _, own_codes, own_made = in_flax(weights, x, codes)
        assert np.mean(own_codes == codes) >= 0.999
        assert_close(own_made[same], made[same], 1e-4, "pixels in flax")


def test_a_converted_diffusers_model_gives_the_same(tmp_path: Any, small: VqganConfig) -> None:
    compare_with_diffusers(small, 3, tmp_path, flax_too=False)


@pytest.mark.slow
def test_a_converted_diffusers_model_of_full_size_gives_the_same(tmp_path: Any) -> None:
    compare_with_diffusers(LWM, 1, tmp_path, flax_too=True)
