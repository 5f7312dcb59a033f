"""What an encoder keeps, with one whose codes and pictures are known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from lwm_core.errors import DataError, LwmError
from lwm_core.protocols import ChecksSetup, EvalContext
from lwm_evals import ReconstructionOptions, ReconstructionSuite
from lwm_evals.read_frames import find_files, read_frames
from lwm_evals.reconstruction import measure
from lwm_evals.similarity import psnr, ssim


@pytest.fixture
def make(make_context: Callable[..., EvalContext], encoder: Any, tmp_path: Path) -> Callable[..., EvalContext]:
    def build(**changes: Any) -> EvalContext:
        out = tmp_path / "run" / "evals" / "reconstruction"
        return make_context(**{"generator": None, "encoder": encoder, "out": out, **changes})

    return build


def results(context: EvalContext) -> dict[str, Any]:
    return dict(json.loads(Path(f"{context.out}.json").read_text()))


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    x, y = np.linspace(0, 255, width), np.linspace(0, 255, height)
    pixels = np.stack(np.broadcast_arrays(x[None, :], y[:, None], 128.0), axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def test_the_numbers_are_those_of_the_frames(make: Any, encoder: Any, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    for number, side in enumerate((32, 40, 64)):
        gradient(side, side).save(tmp_path / "p" / f"{number}.png")
    context = make()
    [summary] = ReconstructionSuite(ReconstructionOptions(path="p")).run(context)
    frames, names = read_frames(tmp_path / "p", 32, 32)
    assert names == ["0.png", "1.png", "2.png"] and (frames[0] == np.asarray(gradient(32, 32))).all()
    codes = encoder.encode(frames)
    made = encoder.decode(codes)
    counts = {int(code): int((codes == code).sum()) for code in np.unique(codes)}
    entropy = -sum(n / codes.size * math.log(n / codes.size) for n in counts.values())
    ratios = psnr(made, frames)
    assert summary == {
        "frames": 3, "psnr": pytest.approx(ratios.mean()), "worst_psnr": pytest.approx(ratios.min()),
        "ssim": pytest.approx(ssim(made, frames).mean()), "exact": 0, "codes_used": len(counts),
        "usage": len(counts) / 512, "perplexity": pytest.approx(math.exp(entropy)),
    }  # fmt: skip
    rows = results(context)["rows"]
    assert [row["name"] for row in rows] == names and [row["frame"] for row in rows] == [0, 1, 2]
    assert [row["psnr"] for row in rows] == pytest.approx(ratios.tolist())
    assert [row["codes_used"] for row in rows] == [len(np.unique(one)) for one in codes]


def test_an_encoder_that_keeps_everything_is_told_as_such() -> None:
    """Two frames, one of which comes back to the bit: the mean is the other's, and JSON has no infinity."""
    frames = np.full((2, 12, 12, 3), 100, np.uint8)
    made = frames.copy()
    made[1] += 10
    rows, summary = measure(frames, made, np.array([[3, 3], [4, 3]], np.int32), 8, ["a", "b"])
    assert [row["psnr"] for row in rows] == [None, pytest.approx(20 * math.log10(25.5))]
    assert (summary["exact"], summary["psnr"], summary["codes_used"]) == (1, rows[1]["psnr"], 2)
    assert summary["perplexity"] == pytest.approx((4 / 3) ** 0.75 * 4**0.25)
    json.dumps(rows, allow_nan=False)
    _, whole = measure(frames, frames, np.zeros((2, 2), np.int32), 8, ["a", "b"])
    assert (whole["exact"], whole["psnr"], whole["worst_psnr"], whole["ssim"]) == (2, None, None, 1.0)


def test_it_is_measured_once_until_something_else_is(make: Any, encoder: Any) -> None:
    suite = ReconstructionSuite()
    first = suite.run(make(stage="base"))
    assert encoder.encoded == [32] and first[0]["frames"] == 32 and "stage" not in first[0]
    assert ReconstructionSuite().run(make(stage="512")) == first and encoder.encoded == [32]
    ReconstructionSuite(ReconstructionOptions(frames=5)).run(make())
    assert encoder.encoded == [32, 5]
    encoder.checksum = "d" * 64
    ReconstructionSuite(ReconstructionOptions(frames=5)).run(make())
    assert encoder.encoded == [32, 5, 5]


def test_the_picture_shows_frames_above_and_what_became_of_them_below(make: Any, encoder: Any) -> None:
    suite, context = ReconstructionSuite(), make()
    assert suite.draw(context.out) == {}
    suite.run(context)
    [(title, data)] = suite.draw(context.out).items()
    assert title == "Reconstruction" and data.startswith(b"\x89PNG")
    with Image.open(BytesIO(data)) as picture:
        sheet = np.asarray(picture.convert("RGB"))
    assert sheet.shape == (2 * 32 + 4, 6 * 32 + 5 * 4, 3)
    shown = np.stack([sheet[:32, x : x + 32] for x in range(0, 6 * 36, 36)])
    below = np.stack([sheet[36:, x : x + 32] for x in range(0, 6 * 36, 36)])
    assert (below == encoder.decode(encoder.encode(shown))).all() and len(np.unique(shown)) > 20


def crop(picture: NDArray[np.uint8]) -> tuple[float, float]:
    """Mean red and mean green: where in :func:`gradient` a square was cut."""
    return float(picture[..., 0].mean()), float(picture[..., 1].mean())


@pytest.mark.parametrize("size", [(96, 32), (32, 96), (50, 50)])
def test_the_middle_is_cut_out(tmp_path: Path, size: tuple[int, int]) -> None:
    gradient(*size).save(tmp_path / "one.png")
    frames, names = read_frames(tmp_path / "one.png", 32, 4)
    assert frames.shape == (1, 32, 32, 3) and names == ["one.png"]
    assert crop(frames[0]) == pytest.approx((127.5, 127.5), abs=1.5)
    wide, high = (frames[0, ..., channel].max() - int(frames[0, ..., channel].min()) for channel in (0, 1))
    assert (wide < 100) == (size[0] > size[1]) and (high < 100) == (size[1] > size[0])


def test_frames_are_taken_evenly_from_all_files(tmp_path: Path) -> None:
    levels = [Image.new("RGB", (16, 16), (value, value, value)) for value in range(0, 200, 20)]
    levels[0].save(tmp_path / "a.gif", save_all=True, append_images=levels[1:6])
    for number, level in enumerate(levels[6:]):
        level.save(tmp_path / f"b{number}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    frames, names = read_frames(tmp_path, 16, 4)
    assert names == ["a.gif 0", "a.gif 3", "b0.png", "b3.png"]
    assert frames.mean(axis=(1, 2, 3)) == pytest.approx([0, 60, 120, 180], abs=3)


def test_a_picture_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    gradient(40, 40).save(tmp_path / "one.jpg", exif=exif, quality=95)
    frames, _ = read_frames(tmp_path, 32, 1)
    left, right = frames[0, :, :4, 1].mean(), frames[0, :, -4:, 1].mean()
    assert left > 200 and right < 55, "what grew downwards now grows to the left"


def test_videos_are_read_with_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "v.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=4)
        stream.width = stream.height = 32
        stream.pix_fmt = "bgr0"
        for level in range(0, 250, 25):
            for packet in stream.encode(av.VideoFrame.from_image(Image.new("RGB", (32, 32), (level, 0, 0)))):
                container.mux(packet)
        container.mux(stream.encode(None))
    frames, names = read_frames(path, 32, 3)
    assert names == ["v.mkv 0", "v.mkv 4", "v.mkv 9"]
    assert frames[..., 0].mean(axis=(1, 2)) == pytest.approx([0, 100, 225], abs=1)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match=r"v\.mkv: is no video that can be read"):
        read_frames(path, 32, 3)
    monkeypatch.setattr("lwm_evals.read_frames.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'lwm-evals\[video\]'"):
        find_files(path)


def test_wrong_use_is_one_line(make: Any, encoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    Image.fromarray(np.zeros((16, 16), np.uint16)).save(tmp_path / "deep.png")

    def refused(call: Callable[[EvalContext], object], message: str) -> None:
        with pytest.raises(LwmError, match=message) as caught:
            call(make())
        assert "\n" not in str(caught.value) and str(caught.value).startswith("reconstruction: ")

    for path, message in (("empty", "empty: there is no picture or video"), ("gone", "gone: there is no picture")):
        suite = ReconstructionSuite(ReconstructionOptions(path=path))
        assert isinstance(suite, ChecksSetup)
        refused(suite.check, message)
    for path, message in (("broken.png", "is no picture that can be read"), ("deep.png", "more than eight bits")):
        refused(ReconstructionSuite(ReconstructionOptions(path=path)).run, message)
    ReconstructionSuite().check(make())
    monkeypatch.setattr(type(encoder), "frame_size", 8)
    refused(ReconstructionSuite().check, "frames are 8 × 8; expected at least 11 a side")
