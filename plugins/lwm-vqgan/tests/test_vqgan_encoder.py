"""The encoder as the core meets it: shapes, ranges, batches, both frameworks, and errors in a line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lwm_core.errors import CheckpointError, PluginError, ShapeError
from lwm_core.protocols import EncoderContext, VisionEncoder
from lwm_core.registry import Registry, plugin_options_model
from lwm_vqgan import encoder as encoder_module
from lwm_vqgan.encoder import VqganEncoder, vqgan
from lwm_vqgan.model.config import VqganConfig
from lwm_vqgan.options import VqganOptions, no_framework
from lwm_vqgan.weights.folder import VqganWeights, write_folder

Random = Callable[..., VqganWeights]


@pytest.fixture(scope="module")
def weights(small: VqganConfig, random_vqgan: Random) -> VqganWeights:
    return random_vqgan(small, 3)


@pytest.fixture(scope="module")
def in_torch(weights: VqganWeights) -> VqganEncoder:
    return VqganEncoder(weights, "torch", 4)


def test_it_is_what_the_core_calls_an_encoder(in_torch: VqganEncoder, held_out: NDArray[np.uint8]) -> None:
    assert isinstance(in_torch, VisionEncoder)
    codes = in_torch.encode(held_out)
    assert codes.shape == (12, 256) and codes.dtype == np.int32
    assert codes.min() >= 0 and codes.max() < in_torch.codes == 300
    made = in_torch.decode(codes)
    assert made.shape == held_out.shape and made.dtype == np.uint8


def test_both_frameworks_give_the_same(
    in_torch: VqganEncoder, weights: VqganWeights, held_out: NDArray[np.uint8]
) -> None:
    in_jax = VqganEncoder(weights, "jax", 4)
    codes = in_torch.encode(held_out)
    assert np.mean(in_jax.encode(held_out) == codes) >= 0.999
    difference = in_jax.decode(codes).astype(int) - in_torch.decode(codes)
    assert np.abs(difference).max() <= 1 and np.mean(difference != 0) < 1e-3  # rounding at a half
    assert in_jax.checksum == in_torch.checksum and len(in_jax.checksum) == 64


@pytest.mark.parametrize("batch", [1, 5, 16])
def test_another_batch_size_gives_the_same(
    batch: int, in_torch: VqganEncoder, weights: VqganWeights, held_out: NDArray[np.uint8]
) -> None:
    """But for the last digit, as the libraries sum in another order: a pixel may be rounded to its neighbour."""
    other = VqganEncoder(weights, "torch", batch)
    codes = in_torch.encode(held_out)
    assert np.mean(other.encode(held_out) == codes) >= 0.999
    difference = other.decode(codes).astype(int) - in_torch.decode(codes)
    assert np.abs(difference).max() <= 1 and np.mean(difference != 0) < 1e-3


def test_a_frame_does_not_depend_on_its_neighbours(in_torch: VqganEncoder, held_out: NDArray[np.uint8]) -> None:
    """To the bit: alone, among others and in another place of a batch."""
    codes = in_torch.encode(held_out)
    made = in_torch.decode(codes)
    for order in (np.arange(11, 2, -1), np.array([7])):
        np.testing.assert_array_equal(in_torch.encode(held_out[order]), codes[order])
        np.testing.assert_array_equal(in_torch.decode(codes[order]), made[order])


def test_frames_come_in_rows_from_the_top_left(in_torch: VqganEncoder, held_out: NDArray[np.uint8]) -> None:
    """Changing the bottom right corner of a picture changes the last code, and far from it hardly any."""
    before = held_out[:1].copy()
    after = before.copy()
    after[:, 60:, 60:] = 255 - after[:, 60:, 60:]
    changed = (in_torch.encode(before) != in_torch.encode(after)).reshape(16, 16)
    assert changed[12:, 12:].mean() > 4 * changed[:8, :8].mean() and changed[14:, 14:].any()


def test_no_frames_give_no_codes(in_torch: VqganEncoder) -> None:
    assert in_torch.encode(np.empty((0, 64, 64, 3), np.uint8)).shape == (0, 256)
    assert in_torch.decode(np.empty((0, 256), np.int32)).shape == (0, 64, 64, 3)


@pytest.mark.parametrize(
    "frames",
    [np.zeros((1, 64, 64, 3), np.float32), np.zeros((64, 64, 3), np.uint8), np.zeros((1, 3, 64, 64), np.uint8),
     np.zeros((1, 32, 64, 3), np.uint8), np.zeros((1, 64, 64, 4), np.uint8)],
)  # fmt: skip
def test_frames_of_another_size_or_type_are_refused(frames: NDArray[Any], in_torch: VqganEncoder) -> None:
    with pytest.raises(ShapeError, match=r"vqgan: frames are \w+ \[.*\]; expected uint8 \[T, 64, 64, 3\]"):
        in_torch.encode(frames)


@pytest.mark.parametrize(
    ("codes", "told"),
    [
        (np.zeros((1, 255), np.int32), r"codes are int32 \[1, 255\]; expected int32 \[T, 256\]"),
        (np.zeros((1, 16, 16), np.int32), r"codes are int32 \[1, 16, 16\]"),
        (np.zeros((1, 256), np.float32), "codes are float32"),
        (np.full((1, 256), 300), "codes run from 300 to 300; expected 0 to 299"),
        (np.full((1, 256), -1), "codes run from -1 to -1"),
        (np.full((1, 256), 1 << 40), "expected 0 to 299"),
    ],
)
def test_codes_that_are_no_frames_are_refused(codes: NDArray[Any], told: str, in_torch: VqganEncoder) -> None:
    with pytest.raises(ShapeError, match=told):
        in_torch.decode(codes)


def test_the_checksum_is_of_the_weights(weights: VqganWeights, in_torch: VqganEncoder) -> None:
    changed = {name: array.copy() for name, array in weights.parameters.items()}
    changed["decoder.conv_out.bias"][0] += 1e-6
    assert VqganEncoder(VqganWeights(weights.config, changed, "changed"), "torch", 1).checksum != in_torch.checksum


def test_auto_follows_the_trainer(weights: VqganWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "model", weights)
    options = VqganOptions(weights="model")
    here = {"base_dir": tmp_path}
    assert vqgan(options, EncoderContext("torch", **here)).framework == "torch"
    assert vqgan(options, EncoderContext("jax", **here)).framework == "jax"
    assert vqgan(options, EncoderContext(None, **here)).framework == "jax"
    named = VqganOptions(weights="model", framework="torch")
    assert vqgan(named, EncoderContext("jax", **here)).framework == "torch"
    monkeypatch.setattr(encoder_module, "installed", lambda framework: framework == "torch")
    assert vqgan(options, EncoderContext(None, **here)).framework == "torch"
    with pytest.raises(PluginError, match=r"vqgan: jax is not installed: pip install 'lwm-vqgan\[jax\]'"):
        vqgan(options, EncoderContext("jax", **here))
    monkeypatch.setattr("lwm_vqgan.options.installed", lambda framework: False)
    assert "pip install lwm-vqgan[jax]" in no_framework()[0]


def test_missing_weights_are_told_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder or file; expected 'embedded', a folder"):
        vqgan(VqganOptions(weights="elsewhere"), EncoderContext("torch", tmp_path))


def test_the_registry_finds_it() -> None:
    registry = Registry()
    spec = registry.choose("encoder", "vqgan").spec
    assert spec.framework is None
    assert plugin_options_model(registry, "encoder", "vqgan") is VqganOptions
    assert registry.load("encoder", "vqgan") is vqgan
