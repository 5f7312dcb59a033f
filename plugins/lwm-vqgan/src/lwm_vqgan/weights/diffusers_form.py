"""Reading diffusers' ``VQModel`` folders (aMUSEd's ``vqvae``): their names and layouts are the canonical ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lwm_core.errors import CheckpointError
from lwm_vqgan.model.config import VqganConfig
from lwm_vqgan.weights.folder import CONFIG_FILE, VqganWeights, checked_config, read_json

CLASS_NAME = "VQModel"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
GRID = 16
"""Codes in a row of a frame; diffusers' configuration does not say the size of pictures, LWM's frames are 16 × 16."""

_EXPECTED: Mapping[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "act_fn": "silu",
    "norm_type": "group",
    "mid_block_add_attention": False,
}
_DEFAULTS: Mapping[str, Any] = {
    "in_channels": 3, "out_channels": 3, "act_fn": "silu", "norm_type": "group", "mid_block_add_attention": True,
    "layers_per_block": 1, "norm_num_groups": 32, "vq_embed_dim": None, "num_vq_embeddings": 256,
    "latent_channels": 3, "block_out_channels": [64],
    "down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"],
}  # fmt: skip
"""What diffusers takes where its file is silent."""

_BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}


def read_diffusers(folder: Path) -> VqganWeights:
    """The weights in a folder that ``VQModel.save_pretrained`` wrote.

    Raises:
        CheckpointError: a file is missing or damaged, or the model is not the VQGAN of this package (it has
            attention, say).
    """
    from lwm_core.weights import LazyParameters

    config = config_of(read_json(folder / CONFIG_FILE), folder / CONFIG_FILE)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder}: there is no {WEIGHTS_FILE}; a .bin is a pickle and is not read")
    return VqganWeights(config, LazyParameters(path), str(folder))


def config_of(values: Mapping[str, Any], path: Path) -> VqganConfig:
    """Our configuration for diffusers'; the size of a frame is 16 codes each way.

    Raises:
        CheckpointError: the model is of another class or has parts that this VQGAN has not.
    """
    if values.get("_class_name") != CLASS_NAME:
        raise CheckpointError(f"{path}: _class_name is {values.get('_class_name')!r}; expected {CLASS_NAME!r}")
    said = {**_DEFAULTS, **values}
    for key, expected in _EXPECTED.items():
        if said[key] != expected:
            raise CheckpointError(f"{path}: {key} is {said[key]!r}; expected {expected!r}, as LWM's VQGAN has it")
    for key, expected in _BLOCKS.items():
        if any(block != expected for block in said[key]):
            raise CheckpointError(f"{path}: {key} is {said[key]!r}; expected {expected!r} alone")
    try:
        channels = [int(width) for width in said["block_out_channels"]]
        layers, base = int(said["layers_per_block"]), channels[0]
        uneven = [width for width in channels if width % base]
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: block_out_channels or layers_per_block is not of numbers: {error}") from None
    if uneven:
        raise CheckpointError(f"{path}: block_out_channels {channels} are not multiples of the first")
    latent = said["latent_channels"]
    return checked_config(
        {
            "frame_size": GRID << (len(channels) - 1),
            "base_channels": base,
            "channel_multipliers": [width // base for width in channels],
            "encoder_blocks": layers,
            "decoder_blocks": layers + 1,
            "latent_channels": latent,
            "code_dim": latent if said["vq_embed_dim"] is None else said["vq_embed_dim"],
            "codes": said["num_vq_embeddings"],
            "norm_groups": said["norm_num_groups"],
        },
        path,
    )
