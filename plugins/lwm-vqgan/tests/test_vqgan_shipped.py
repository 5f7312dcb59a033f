"""The small VQGAN that ships: as good as its card says, on pictures that it has never seen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import lwm_vqgan
from lwm_core.protocols import EncoderContext
from lwm_vqgan.encoder import VqganEncoder, vqgan
from lwm_vqgan.measure import measure
from lwm_vqgan.model.parameters import parameter_count
from lwm_vqgan.options import VqganOptions
from lwm_vqgan.weights.folder import EMBEDDED

PACKAGE = Path(lwm_vqgan.__file__).parent
MAX_PACKAGE = 8_000_000  # bytes
CARD = (EMBEDDED / "CARD.md").read_text(encoding="utf-8")
MEASURED = json.loads((EMBEDDED / "measured.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def shipped() -> VqganEncoder:
    return vqgan(VqganOptions(), EncoderContext("torch"))


def test_it_keeps_held_out_photographs(shipped: VqganEncoder, held_out: NDArray[np.uint8]) -> None:
    found = measure(shipped, held_out)
    assert found.psnr >= 24.0 and found.worst_psnr >= 18.0 and found.ssim >= 0.65, found
    assert found.codes_used > 1000, found  # of the 3072 that twelve crops have


@pytest.mark.slow
def test_it_keeps_a_video_that_it_was_not_trained_on(shipped: VqganEncoder) -> None:
    """Every frame of the clip that ships, scaled as ``lwm encode`` does; near what the card has."""
    pytest.importorskip("av")
    from lwm_vqgan.media import open_clip, preprocess

    clip = open_clip(PACKAGE / "clips" / "bigbuckbunny.mp4")
    frames = np.stack([preprocess(frame.pixels, shipped.frame_size) for frame in clip.frames()])
    found, told = measure(shipped, frames), MEASURED["video"]
    assert found.psnr >= 24.0 and found.psnr == pytest.approx(told["psnr"], abs=0.1), found
    assert found.frames == told["frames"] and found.codes_used == pytest.approx(told["codes_used"], rel=0.05)


def test_a_picture_goes_in_and_comes_out_as_itself(shipped: VqganEncoder, held_out: NDArray[np.uint8]) -> None:
    """Each reconstruction is nearer to its own crop than to any other: nothing is mixed up on the way."""
    made = shipped.decode(shipped.encode(held_out)).astype(float)
    error = np.square(made[:, None] - held_out[None]).mean(axis=(2, 3, 4))
    np.testing.assert_array_equal(error.argmin(axis=1), np.arange(len(held_out)))


def test_its_shape_is_what_a_vocabulary_for_lwm_holds(shipped: VqganEncoder) -> None:
    assert (shipped.codes, shipped.codes_per_frame, shipped.frame_size) == (8192, 256, 64)


def test_what_was_measured_is_what_was_asked_for() -> None:
    photographs, video = MEASURED["photographs"], MEASURED["video"]
    assert photographs["frames"] == 1000 and photographs["psnr"] >= 24.0 and photographs["usage"] >= 0.5
    assert video["frames"] == 132 and video["psnr"] >= 24.0


def test_the_card_says_what_was_measured(shipped: VqganEncoder) -> None:
    for what in ("photographs", "video"):
        row = MEASURED[what]
        figures = (f"{row['frames']:,}", f"{row['psnr']:.2f}", f"{row['worst_psnr']:.2f}", f"{row['ssim']:.3f}",
                   f"{row['codes_used']:,}")  # fmt: skip
        assert f"| {' | '.join(figures)} |" in CARD, what
    assert f"{parameter_count(shipped.config):,}" in CARD
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert f"{parameter_count(shipped.config):,}" in readme


def test_the_package_is_small() -> None:
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= MAX_PACKAGE
    strange = [path for path in files if path.suffix in (".png", ".jpg", ".mp4", ".pkl", ".bin")]
    assert strange == [PACKAGE / "clips" / "bigbuckbunny.mp4"]
