"""Training: losses and codebook against plain formulas, exact resuming, and the command from pictures to an encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image

from lwm_core.cli import main
from lwm_core.errors import CheckpointError, ConfigError, DataError, TrainingError, UsageError
from lwm_vqgan.measure import measure, psnr, ssim
from lwm_vqgan.model.config import VqganConfig
from lwm_vqgan.model.torch_vqgan import Codebook
from lwm_vqgan.train.codebook import RunningCodebook, assign, k_means
from lwm_vqgan.train.losses import adaptive_weight, discriminator_loss, gradient_error
from lwm_vqgan.train.options import TrainOptions
from lwm_vqgan.train.pictures import Pictures, decode_pictures, find_pictures
from lwm_vqgan.train.run import train
from lwm_vqgan.train.settings import settings
from lwm_vqgan.train.trainer import VqganTrainer

TINY = VqganConfig(
    frame_size=16, base_channels=8, channel_multipliers=(1, 2), encoder_blocks=1, decoder_blocks=1, latent_channels=4,
    code_dim=4, codes=32, norm_groups=2,
)  # fmt: skip
QUICK = TrainOptions(
    steps=12, batch=4, warmup_steps=2, codebook_from=4, restart_every=3, restart_below=0.5, log_every=4, save_every=6
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures: stripes, noise and a ramp, one of them with transparency."""
    place = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    ramp = np.linspace(0, 255, 40 * 60 * 3).reshape(40, 60, 3).astype(np.uint8)
    for index, pixels in enumerate([ramp, ramp[::-1], random.integers(0, 256, (50, 33, 3), np.uint8), 255 - ramp]):
        Image.fromarray(pixels).save(place / f"{index}.png")
    Image.fromarray(np.zeros((20, 20, 4), np.uint8)).save(place / "clear.png")
    return place


@pytest.fixture(scope="module")
def pictures(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    return decode_pictures(find_pictures([folder]), tmp_path_factory.mktemp("decoded"), 16)


def test_crops_are_a_function_of_seed_and_step(pictures: Pictures) -> None:
    first = pictures.batch(3, 5, 8)
    assert first.shape == (8, 16, 16, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(pictures.batch(3, 5, 8), first)
    assert (pictures.batch(3, 6, 8) != first).any() and (pictures.batch(4, 5, 8) != first).any()


def test_crops_are_pieces_of_the_pictures(tmp_path: Path) -> None:
    """At full size they stand in the picture, as they are or mirrored; at the smallest they are means of squares."""
    whole = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(whole).save(tmp_path / "noise.png")
    noise = decode_pictures(find_pictures([tmp_path]), tmp_path / "decoded", 16)
    assert [(level.height, level.width) for level in noise.levels[0]] == [(16, 16), (20, 20), (26, 26), (32, 32)]
    crops = noise.batch(0, 0, 100, jitter=False)
    small = whole.reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
    windows = sliding_window_view(whole, (16, 16), axis=(0, 1)).transpose(0, 1, 3, 4, 2).reshape(-1, 16, 16, 3)
    for mirrored in (crops, crops[:, :, ::-1]):
        assert sum(np.abs(crop - small).max() <= 1 for crop in mirrored) >= 5
        assert sum((windows == crop).all(axis=(1, 2, 3)).any() for crop in mirrored) >= 5


def test_sizes_end_at_the_pictures_own_and_what_is_clear_is_white(pictures: Pictures) -> None:
    assert [(level.height, level.width) for level in pictures.levels[0]] == [(16, 24), (20, 30), (26, 39), (32, 48)]
    white = (pictures.batch(0, 0, 200, jitter=False) == 255).all(axis=(1, 2, 3))
    assert 20 <= white.sum() <= 60  # one picture of five


def test_pictures_that_cannot_be_used_are_told_and_left_out(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not a picture")
    Image.new("RGB", (40, 8)).save(tmp_path / "flat.png")
    told: list[str] = []
    with pytest.raises(DataError, match="none of 2 pictures can be used; expected at least 16 pixels a side"):
        decode_pictures(find_pictures([tmp_path]), tmp_path / "decoded", 16, note=told.append)
    assert len(told) == 2 and "40×8 pixels" in told[0] and "text.jpg" in told[1]
    with pytest.raises(DataError, match="there is no such file or folder"):
        find_pictures([tmp_path / "nowhere"])
    with pytest.raises(DataError, match="no picture found"):
        find_pictures([tmp_path / "decoded"])


def test_gradient_error_is_the_error_of_differences() -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 2, 3, 8, 8))
    wanted = 0.0
    for size in (8, 4, 2):
        x, y = (v.reshape(2, 3, size, 8 // size, size, 8 // size).mean(axis=(3, 5)) for v in (a, b))
        wanted += np.abs(np.diff(x, axis=2) - np.diff(y, axis=2)).mean()
        wanted += np.abs(np.diff(x, axis=3) - np.diff(y, axis=3)).mean()
    assert gradient_error(torch.tensor(a), torch.tensor(b)).item() == pytest.approx(wanted / 3)


def test_the_adversarial_term_pulls_as_hard_as_the_reconstruction() -> None:
    """Equation 7 of Esser et al. by hand: two losses that are linear in the last weights."""
    last = torch.ones(3, requires_grad=True)
    reconstruction, fooled = (last * torch.tensor([3.0, 4.0, 0.0])).sum(), (last * torch.tensor([0.0, 0.0, 0.5])).sum()
    assert adaptive_weight(reconstruction, fooled, last).item() == pytest.approx(5 / 0.5, rel=1e-3)
    assert discriminator_loss(torch.tensor([0.5, 2.0]), torch.tensor([-0.5, -2.0])).item() == pytest.approx(0.25)


def test_k_means_finds_clusters_and_assigns_to_the_nearest() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    points = (corners.repeat(50, 1) + 0.1 * torch.randn(200, 2, generator=generator)).contiguous()
    centres = k_means(points, 16, 8, generator)
    nearest = assign(points, centres)
    brute = torch.cdist(points.double(), centres.double()).argmin(1)
    assert torch.equal(nearest, brute)
    assert (points - centres[nearest]).norm(dim=1).max() < 1.0
    few = k_means(points[:3], 8, 2, generator)
    assert few.shape == (8, 2) and torch.isfinite(few).all()


def test_the_running_codebook_is_the_mean_of_what_it_was_given() -> None:
    book = Codebook(3, 2)
    running = RunningCodebook(book, decay=0.5)
    running.begin(torch.tensor([[0.0, 0.0], [1.0, 1.0], [9.0, 9.0]]), latents_a_step=3)
    running.follow(torch.tensor([[2.0, 0.0], [4.0, 0.0], [1.0, 3.0]]), torch.tensor([0, 0, 1]))
    # Code 0: count (1 + 2) / 2, sum ((0, 0) + (6, 0)) / 2. Code 1: count 1, sum ((1, 1) + (1, 3)) / 2. Code 2 fades.
    assert book.embedding.weight.tolist() == [[2.0, 0.0], [1.0, 2.0], [9.0, 9.0]]
    assert running.counts.tolist() == [1.5, 1.0, 0.5]
    fresh = torch.tensor([[7.0, 7.0]])
    assert running.restart(fresh, below=0.6, generator=torch.Generator()) == 1
    assert book.embedding.weight.tolist() == [[2.0, 0.0], [1.0, 2.0], [7.0, 7.0]]
    assert running.counts.tolist() == [1.5, 1.0, 1.0]


def test_psnr_and_ssim_are_their_formulas() -> None:
    random = np.random.default_rng(0)
    a = random.integers(0, 256, (2, 13, 12, 3), np.uint8)
    b = np.clip(a + random.integers(-30, 31, a.shape), 0, 255).astype(np.uint8)
    assert psnr(a, a).tolist() == [np.inf, np.inf] and ssim(a, a) == pytest.approx([1.0, 1.0])
    assert psnr(np.zeros_like(a), np.full_like(a, 255)) == pytest.approx([0.0, 0.0])
    weights = np.exp(-(np.arange(-5, 6)[:, None] ** 2 + np.arange(-5, 6) ** 2) / 4.5)
    weights /= weights.sum()
    scores = []
    for top, left, channel in np.ndindex(3, 2, 3):
        x, y = (v[0, top : top + 11, left : left + 11, channel].astype(float) for v in (a, b))
        mx, my = (weights * x).sum(), (weights * y).sum()
        vx, vy, cov = ((weights * p).sum() for p in ((x - mx) ** 2, (y - my) ** 2, (x - mx) * (y - my)))
        c1, c2 = 2.55**2, 7.65**2
        scores.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    assert ssim(a, b)[0] == pytest.approx(np.mean(scores))


def test_usage_and_perplexity_count_codes() -> None:
    class Half:
        codes, frame_size, codes_per_frame, checksum = 8, 16, 4, ""

        def encode(self, frames: NDArray[np.uint8]) -> NDArray[np.int32]:
            return np.tile(np.array([0, 1, 2, 3], np.int32), (len(frames), 1))

        def decode(self, codes: NDArray[np.int32]) -> NDArray[np.uint8]:
            return np.zeros((len(codes), 16, 16, 3), np.uint8)

    found = measure(Half(), np.full((5, 16, 16, 3), 255, np.uint8))
    assert (found.codes_used, found.usage, found.psnr) == (4, 0.5, 0.0)
    assert found.perplexity == pytest.approx(4.0)
    with pytest.raises(DataError):
        measure(Half(), np.empty((0, 16, 16, 3), np.uint8))


def test_it_learns(pictures: Pictures) -> None:
    options = TrainOptions(steps=90, batch=8, lr=1e-2, warmup_steps=5, codebook_from=30, restart_every=10)
    trainer = VqganTrainer(TINY, options, pictures)
    rows = [trainer.advance() for _ in range(options.steps)]
    late = np.mean([row["psnr"] for row in rows[-20:]])
    assert late > np.mean([row["psnr"] for row in rows[:5]]) + 4
    assert len(torch.unique(torch.cat([row["codes"] for row in rows[-10:]]))) > 16


@pytest.mark.parametrize("adversarial", [0.0, 0.5])
def test_a_continued_run_is_the_same_to_the_bit(adversarial: float, folder: Path, tmp_path: Path) -> None:
    options = QUICK.model_copy(update={"adversarial": adversarial, "adversarial_from": 5})
    other = options.model_copy(update={"steps": 6, "decay_share": 0.0})
    files = find_pictures([folder])
    told: list[str] = []
    straight = train(TINY, options, files, tmp_path / "straight", note=told.append)
    train(TINY, other, files, tmp_path / "other", note=told.append)
    # The same schedule stopped half-way: killed after its first save.
    state = tmp_path / "halves"
    trainer_stops_after(6, lambda: train(TINY, options, files, state, note=told.append))
    halves = train(TINY, options, files, state, note=told.append)
    assert "goes on after step 6" in told
    for name in ("model.safetensors", "config.json"):
        assert (halves / name).read_bytes() == (straight / name).read_bytes(), name
    assert (straight / "model.safetensors").read_bytes() != (tmp_path / "other/model/model.safetensors").read_bytes()
    rows = [json.loads(line) for line in (state / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 8, 12] or [row["step"] for row in rows] == [4, 8, 8, 12]
    assert any("codes used" in line and "left" in line for line in told)


def trainer_stops_after(steps: int, run: Any) -> None:
    """Run until ``steps`` steps are done, then stop as if killed."""
    advance = VqganTrainer.advance

    def stopping(self: VqganTrainer) -> Any:
        if self.step == steps:
            raise KeyboardInterrupt
        return advance(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VqganTrainer, "advance", stopping)
        with pytest.raises(KeyboardInterrupt):
            run()


def test_another_run_is_not_written_over(folder: Path, tmp_path: Path) -> None:
    files = find_pictures([folder])
    short = QUICK.model_copy(update={"steps": 2})
    train(TINY, short, files, tmp_path, note=lambda line: None)
    with pytest.raises(UsageError, match=r"holds a run with other batch: 4 there, 8 here"):
        train(TINY, short.model_copy(update={"batch": 8}), files, tmp_path, note=lambda line: None)
    with pytest.raises(UsageError, match="with other code_dim: 4 there, 2 here"):
        train(TINY.model_copy(update={"code_dim": 2}), short, files, tmp_path, note=lambda line: None)
    with pytest.raises(UsageError, match="with other pictures; name another folder"):
        train(TINY, short, files[1:], tmp_path, note=lambda line: None)
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="not a whole file"):
        train(TINY, short, files, tmp_path, note=lambda line: None)


def test_a_loss_that_is_not_finite_ends_the_run(pictures: Pictures) -> None:
    trainer = VqganTrainer(TINY, QUICK, pictures)
    with torch.no_grad():
        trainer.model.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(TrainingError, match="step 1: the loss is nan; lower the learning rate"):
        trainer.advance()


def test_the_learning_rate_rises_and_falls() -> None:
    options = TrainOptions(steps=100, lr=1.0, warmup_steps=9, decay_share=0.2)
    assert [round(options.lr_at(step), 6) for step in (0, 4, 9, 79, 80, 90, 99)] == [0.1, 0.5, 1.0, 1.0, 1.0, 0.5, 0.05]
    assert not options.decaying(79) and options.decaying(80)


def test_the_command_trains_measures_and_gives_an_encoder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = ["frame_size=16", "base_channels=8", "channel_multipliers=[1,2]", "latent_channels=4", "code_dim=4",
             "codes=32", "norm_groups=2"]  # fmt: skip
    quick = ["steps=6", "batch=4", "codebook_from=2", "log_every=3"]
    words = [word for text in (*(f"model.{one}" for one in shape), *quick) for word in ("-s", text)]
    run = tmp_path / "run"
    assert main(["vqgan", "train", str(folder), "--out", str(run), *words, "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "step 6/6" in out and "left" in out and f'weights = "{run / "model"}"' in out
    how = ["--weights", str(run / "model"), "--framework", "torch", "--crops", "20", "--json"]
    assert main(["vqgan", "measure", str(folder), *how]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pictures"] == 5 and found["frames"] == 20 and 0 < found["codes_used"] <= 32
    assert main(["vqgan", "import", str(run / "model"), str(tmp_path / "copy"), "--dtype", "float16"]) == 0
    assert "float16; 16² frames, 64 codes of 32" in capsys.readouterr().out
    assert main(["vqgan", "import", str(run / "model"), str(tmp_path / "copy")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_settings_are_checked() -> None:
    config, options = settings("embedded", ["steps=7", "model.codes=64"])
    assert (config.codes, config.frame_size, options.steps) == (64, 64, 7)
    with pytest.raises(ConfigError, match=r"-s stepz: Extra inputs are not permitted; expected one of steps, batch"):
        settings("embedded", ["stepz=7"])
    with pytest.raises(ConfigError, match=r"-s model\.codes: Input should be greater than 0"):
        settings("embedded", ["model.codes=0"])
    for wrong in ("steps", "steps=a b"):
        with pytest.raises(UsageError, match=f"-s {wrong}"):
            settings("embedded", [wrong])
