"""Small models with random parameters, and the held-out crops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from lwm_vqgan.model.config import VqganConfig
from lwm_vqgan.model.parameters import CODEBOOK, parameter_shapes
from lwm_vqgan.weights.folder import VqganWeights

SIDE = 64


def random_weights(config: VqganConfig, seed: int = 0) -> VqganWeights:
    """Weights under which activations keep their size and latents spread over the codebook."""
    random = np.random.default_rng(seed)

    def drawn(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        values = random.normal(size=shape)
        if len(shape) == 4:
            values *= np.prod(shape[1:]) ** -0.5
        elif name != CODEBOOK:
            values = 0.1 * values + ("norm" in name and name.endswith("weight"))
        return values.astype(np.float32)

    shapes = parameter_shapes(config)
    return VqganWeights(config, {name: drawn(name, shape) for name, shape in shapes.items()}, "random")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from more threads, which wait for each other on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def random_vqgan() -> Callable[..., VqganWeights]:
    """:func:`random_weights`."""
    return random_weights


@pytest.fixture(scope="session")
def small() -> VqganConfig:
    """The big model's structure, narrow and less deep: blocks that change the width, and widths that repeat."""
    return VqganConfig(
        frame_size=64, base_channels=8, channel_multipliers=(1, 2, 2), encoder_blocks=1, decoder_blocks=2,
        latent_channels=6, code_dim=5, codes=300, norm_groups=4,
    )  # fmt: skip


@pytest.fixture(scope="session")
def held_out() -> NDArray[np.uint8]:
    """Twelve crops [12,64,64,3] of four photographs that nothing was trained on; see data/README.md."""
    from PIL import Image

    row = np.asarray(Image.open(Path(__file__).parent / "data" / "held_out.png"))
    return np.stack(np.split(row, row.shape[1] // SIDE, axis=1))
