"""Weights on disk: our folder, diffusers' folder and LWM's file, and what is told where they are wrong."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from lwm_core.errors import CheckpointError
from lwm_core.testing.tolerance import assert_close
from lwm_vqgan.model.config import VqganConfig
from lwm_vqgan.model.parameters import parameter_shapes
from lwm_vqgan.model.torch_runner import torch_vqgan
from lwm_vqgan.weights.diffusers_form import config_of
from lwm_vqgan.weights.folder import VqganWeights, read_folder, write_folder
from lwm_vqgan.weights.load import read_weights
from lwm_vqgan.weights.lwm_form import lwm_tree, read_lwm

Random = Callable[..., VqganWeights]
AMUSED = {
    "_class_name": "VQModel", "_diffusers_version": "0.25.0", "act_fn": "silu",
    "block_out_channels": [128, 256, 256, 512, 768], "down_block_types": ["DownEncoderBlock2D"] * 5,
    "force_upcast": True, "in_channels": 3, "latent_channels": 64, "layers_per_block": 2, "lookup_from_codebook": True,
    "mid_block_add_attention": False, "norm_num_groups": 32, "norm_type": "group", "num_vq_embeddings": 8192,
    "out_channels": 3, "sample_size": 32, "scaling_factor": 0.18215, "up_block_types": ["UpDecoderBlock2D"] * 5,
    "vq_embed_dim": None,
}  # fmt: skip


@pytest.mark.parametrize(("dtype", "kept"), [("float32", "f4"), ("float16", "f2"), ("bfloat16", ml_dtypes.bfloat16)])
def test_a_folder_comes_back(dtype: Any, kept: Any, small: VqganConfig, random_vqgan: Random, tmp_path: Path) -> None:
    weights = random_vqgan(small)
    write_folder(tmp_path / "model", weights, dtype)
    back = read_weights("model", tmp_path)
    assert back.config == small and list(back.parameters) != [] and set(back.parameters) == set(weights.parameters)
    for name, array in weights.parameters.items():
        assert back.parameter(name).dtype == np.float32
        np.testing.assert_array_equal(back.parameter(name), array.astype(kept).astype(np.float32))
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_amuseds_own_configuration_is_lwms() -> None:
    assert config_of(AMUSED, Path("config.json")) == VqganConfig()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"mid_block_add_attention": True}, "mid_block_add_attention is True; expected False"),
        ({"act_fn": "gelu"}, "act_fn is 'gelu'"),
        ({"norm_type": "spatial"}, "norm_type is 'spatial'"),
        ({"_class_name": "AutoencoderKL"}, "_class_name is 'AutoencoderKL'"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "expected 'DownEncoderBlock2D' alone"),
        ({"block_out_channels": [128, 192]}, "not multiples of the first"),
        ({"block_out_channels": []}, "not of numbers"),
        ({"norm_num_groups": 48}, "does not divide"),
        ({"num_vq_embeddings": "many"}, "codes: Input should be a valid integer"),
    ],
)
def test_another_diffusers_model_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(CheckpointError, match=told) as caught:
        config_of({**AMUSED, **change}, Path("config.json"))
    assert "\n" not in str(caught.value)


def test_attention_is_diffusers_default_and_refused() -> None:
    silent = {key: value for key, value in AMUSED.items() if key != "mid_block_add_attention"}
    with pytest.raises(CheckpointError, match="mid_block_add_attention is True"):
        config_of(silent, Path("config.json"))


# LWM's modules as linen would number their parts, written down anew from the reference's description of the model.


class ResnetBlock(nn.Module):
    width: int
    groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.Conv(self.width, (3, 3))(nn.silu(nn.GroupNorm(self.groups)(x)))
        y = nn.Conv(self.width, (3, 3))(nn.silu(nn.GroupNorm(self.groups)(y)))
        return y + (x if x.shape[-1] == self.width else nn.Conv(self.width, (1, 1))(x))


class Downsample(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        padded = jax.numpy.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        return nn.Conv(x.shape[-1], (3, 3), strides=(2, 2), padding="VALID")(padded)


class Upsample(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        count, height, width, channels = x.shape
        return nn.Conv(channels, (3, 3))(jax.image.resize(x, (count, 2 * height, 2 * width, channels), "nearest"))


class DownsamplingBlock(nn.Module):
    config: Any
    level: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.config.encoder_blocks):
            x = ResnetBlock(self.config.channels[self.level], self.config.norm_groups)(x)
        return x if self.level == len(self.config.channels) - 1 else Downsample()(x)


class UpsamplingBlock(nn.Module):
    config: Any
    level: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.config.decoder_blocks):
            x = ResnetBlock(self.config.channels[self.level], self.config.norm_groups)(x)
        return Upsample()(x) if self.level else x


class MidBlock(nn.Module):
    config: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = ResnetBlock(x.shape[-1], self.config.norm_groups)(x)
        return x


class Encoder(nn.Module):
    config: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.config.channels[0], (3, 3))(x)
        for level in range(len(self.config.channels)):
            x = DownsamplingBlock(self.config, level)(x)
        x = nn.silu(nn.GroupNorm(self.config.norm_groups)(MidBlock(self.config)(x)))
        return nn.Conv(self.config.latent_channels, (3, 3))(x)


class Decoder(nn.Module):
    config: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = MidBlock(self.config)(nn.Conv(self.config.channels[-1], (3, 3))(x))
        for level in reversed(range(len(self.config.channels))):
            x = UpsamplingBlock(self.config, level)(x)
        return nn.Conv(3, (3, 3))(nn.silu(nn.GroupNorm(self.config.norm_groups)(x)))


class Codebook(nn.Module):
    config: Any

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("embeddings", nn.initializers.normal(), (self.config.codes, self.config.code_dim))


class Linen(nn.Module):
    config: Any

    def setup(self) -> None:
        self.encoder, self.decoder = Encoder(self.config), Decoder(self.config)
        self.quantize = Codebook(self.config)
        self.quant_conv = nn.Conv(self.config.code_dim, (1, 1))
        self.post_quant_conv = nn.Conv(self.config.latent_channels, (1, 1))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Latents, and pixels of the latents as they are."""
        self.quantize()
        latents = self.quant_conv(self.encoder(x))
        return latents, self.decoder(self.post_quant_conv(latents))


def test_lwms_tree_is_that_of_linen_modules(small: VqganConfig, random_vqgan: Random, tmp_path: Path) -> None:
    """Names, layouts and numbers: what linen computes with the tree that we pickle, Torch computes once it is read."""
    import torch

    weights = random_vqgan(small)
    model, x = Linen(small), np.random.default_rng(2).uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)
    tree: Any = lwm_tree(weights.parameters)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    assert jax.tree.map(np.shape, tree) == jax.tree.map(lambda leaf: leaf.shape, dict(shapes))
    latents, made = jax.jit(model.apply)({"params": tree}, x)

    path = tmp_path / "vqgan"
    path.write_bytes(pickle.dumps({"params": tree}))
    read = torch_vqgan(read_lwm(path, small))
    with torch.inference_mode():
        own = read.latents(torch.from_numpy(x).permute(0, 3, 1, 2))
        own_made = read.pixels(own).permute(0, 2, 3, 1)
    assert_close(own.numpy(), latents, 1e-4, "latents")
    assert_close(own_made.numpy(), made, 1e-4, "pixels")


def test_every_parameter_of_lwms_has_a_place_of_its_own() -> None:
    zeros = {name: np.broadcast_to(np.float32(0), shape) for name, shape in parameter_shapes(VqganConfig()).items()}
    assert len(jax.tree.leaves(jax.tree.map(lambda _: 0, tree_of_places(zeros)))) == len(zeros) == 277


def tree_of_places(parameters: dict[str, NDArray[Any]]) -> Any:
    """The tree, with vectors in place of the arrays, which are large."""
    return lwm_tree({name: np.zeros(1) for name in parameters})


def damaged(folder: Path, what: str) -> str:
    """Damage the model in ``folder``; what should be told."""
    config, arrays = folder / "config.json", folder / "model.safetensors"
    values = json.loads(config.read_text())
    match what:
        case "no folder":
            return "there is no such folder or file"
        case "no configuration":
            config.unlink()
            return "there is no config.json"
        case "no arrays":
            arrays.unlink()
            return "there is no model.safetensors"
        case "not JSON":
            config.write_text("{")
            return "cannot be read"
        case "a list":
            config.write_text("[]")
            return "holds a list"
        case "another model":
            config.write_text(json.dumps({**values, "model_type": "llama"}))
            return "not a VQGAN's"
        case "another width":
            config.write_text(json.dumps({**values, "base_channels": 16}))
            return "of another shape: encoder.conv_in.weight is .8, 3, 3, 3., expected .16, 3, 3, 3."
        case "another depth":
            config.write_text(json.dumps({**values, "encoder_blocks": 2}))
            return "missing: encoder.down_blocks.0.resnets.1.norm1.weight"
        case "more than there should be":
            config.write_text(json.dumps({**values, "decoder_blocks": 1}))
            return "unknown: decoder.up_blocks.0.resnets.1"
        case "half of the arrays":
            arrays.write_bytes(arrays.read_bytes()[:-100])
            return "not a whole safetensors file"
    raise AssertionError(what)


@pytest.mark.parametrize(
    "what",
    ["no folder", "no configuration", "no arrays", "not JSON", "a list", "another model", "another width",
     "another depth", "more than there should be", "half of the arrays"],
)  # fmt: skip
def test_a_damaged_folder_is_told_in_a_line(
    what: str, small: VqganConfig, random_vqgan: Random, tmp_path: Path
) -> None:
    write_folder(tmp_path / "model", random_vqgan(small))
    told = damaged(tmp_path / "model", what)
    place = "nowhere" if what == "no folder" else "model"
    with pytest.raises(CheckpointError, match=told) as caught:
        read_weights(place, tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_diffusers_folder_without_safetensors_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(AMUSED))
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(CheckpointError, match=r"a \.bin is a pickle and is not read"):
        read_weights(tmp_path)


def test_another_tree_is_not_taken_for_lwms(small: VqganConfig, random_vqgan: Random, tmp_path: Path) -> None:
    tree = lwm_tree(random_vqgan(small).parameters)
    path = tmp_path / "vqgan"
    path.write_bytes(pickle.dumps({**tree, "discriminator": {"kernel": np.zeros(3)}}))
    with pytest.raises(CheckpointError, match="unknown discriminator/kernel"):
        read_lwm(path, small)
    path.write_bytes(pickle.dumps(tree))
    with pytest.raises(CheckpointError, match="there is no encoder/DownsamplingBlock_0/ResnetBlock_1"):
        read_weights(path)


def test_a_written_folder_is_never_half_there(small: VqganConfig, random_vqgan: Random, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_folder(tmp_path / "file", random_vqgan(small))
    write_folder(tmp_path / "model", random_vqgan(small, 1))
    write_folder(tmp_path / "model", random_vqgan(small, 2))
    assert read_folder(tmp_path / "model").parameter("quant_conv.bias").tolist() == pytest.approx(
        random_vqgan(small, 2).parameter("quant_conv.bias").tolist()
    )
