"""Files that are written, read back by PyAV and Pillow directly: as many frames as were given, near what they were."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from lwm_core.errors import DataError, LwmError, ShapeError, UsageError
from lwm_vqgan.media import write as writing
from lwm_vqgan.media import write_media


def psnr(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Peak signal to noise, dB."""
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((one.astype(float) - other) ** 2))))


def directly(path: Path) -> tuple[list[NDArray[np.uint8]], float, str]:
    """All frames, the rate and the pixel format, by PyAV alone."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.average_rate is not None
        return frames, float(stream.average_rate), str(stream.codec_context.pix_fmt)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 60])
@pytest.mark.parametrize("encoder", ["libx264", "mpeg4"])
def test_mp4_holds_as_many_frames_as_are_given(
    count: int, encoder: str, tmp_path: Path, frames_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H.264 and what stands in for it; yuv420p, four a second, more than 30 dB."""
    monkeypatch.setattr(writing, "_ENCODERS", {encoder: writing._ENCODERS[encoder]})
    frames = frames_of(count, 64, 64)
    assert write_media(tmp_path / "a.mp4", iter(frames)) == count
    found, rate, pixels = directly(tmp_path / "a.mp4")
    assert len(found) == count and rate == 4 and pixels == "yuv420p"
    assert min(psnr(one, other) for one, other in zip(found, frames, strict=True)) > 30
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].codec_context.codec.name in ("h264", "mpeg4")
        times = sorted(packet.pts * packet.time_base for packet in container.demux(video=0) if packet.size)
    assert times == [pytest.approx(number / 4) for number in range(count)]
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_colours_stay(tmp_path: Path) -> None:
    """Pure colours come back within rounding of yuv, whatever a reader guesses of the matrix: it is written down."""
    for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (10, 20, 30)):
        frame = np.full((64, 64, 3), colour, np.uint8)
        write_media(tmp_path / "c.mp4", [frame] * 2)
        found, _, _ = directly(tmp_path / "c.mp4")
        assert np.abs(found[1].astype(int) - frame).max() <= 5, colour
    with av.open(str(tmp_path / "c.mp4")) as container:
        one = next(container.decode(video=0))
        assert (one.colorspace, one.color_range) == (6, 1)


@pytest.mark.parametrize(("fps", "rate"), [(4.0, 4.0), (25.0, 25.0), (29.97, 29.97), (0.5, 0.5)])
def test_frames_a_second(fps: float, rate: float, tmp_path: Path, frames_of: Any) -> None:
    write_media(tmp_path / "a.mp4", frames_of(5, 64, 64), fps)
    assert directly(tmp_path / "a.mp4")[1] == pytest.approx(rate, rel=1e-4)


def test_gif_keeps_every_frame_and_few_colours_exactly(tmp_path: Path, frames_of: Any) -> None:
    """Still ones too, and a palette for each frame; Pillow finds the same length of time."""
    grey = np.repeat(np.repeat(np.arange(64, dtype=np.uint8)[None, :, None] * 4, 64, 0), 3, 2)
    frames = [np.roll(grey, 3 * number, 1) for number in range(6)]
    frames[3] = frames[2]
    frames[4] = frames[2]
    assert write_media(tmp_path / "a.gif", frames) == 6
    found, rate, _ = directly(tmp_path / "a.gif")
    assert len(found) == 6 and rate == 4
    assert all((one == other).all() for one, other in zip(found, frames, strict=True))
    smooth = frames_of(5, 63, 47)
    write_media(tmp_path / "b.gif", smooth)
    assert min(psnr(one, other) for one, other in zip(directly(tmp_path / "b.gif")[0], smooth, strict=True)) > 25
    with Image.open(tmp_path / "b.gif") as picture:
        assert picture.n_frames == 5 and picture.info["duration"] == 250


def test_png_is_exact_and_holds_one(tmp_path: Path, frames_of: Any) -> None:
    frames = frames_of(2, 33, 21)
    assert write_media(tmp_path / "a.png", frames[:1]) == 1
    assert (np.asarray(Image.open(tmp_path / "a.png")) == frames[0]).all()
    with pytest.raises(ShapeError, match="more than one frame"):
        write_media(tmp_path / "a.png", frames)
    assert (np.asarray(Image.open(tmp_path / "a.png")) == frames[0]).all(), "what was there is kept"


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png"])
def test_what_cannot_be_written_leaves_nothing(name: str, tmp_path: Path, frames_of: Any) -> None:
    """No frames, frames of two sizes, floats, and frames whose maker fails: one line, and no file."""
    frames = frames_of(3, 64, 64)

    def failing() -> Iterator[NDArray[np.uint8]]:
        yield frames[0]
        raise DataError("the source broke")

    for wrong, words in (
        ([], "no frames to write"),
        ([frames[0], frames[1][:32]], r"\[32, 64, 3\] after others of \[64, 64, 3\]"),
        ([frames[0].astype(float)], "float64"),
        (failing(), "the source broke"),
    ):
        with pytest.raises(LwmError, match=words):
            write_media(tmp_path / name, wrong)  # type: ignore[arg-type]
        assert list(tmp_path.iterdir()) == []


def test_wrong_wishes(tmp_path: Path, frames_of: Any) -> None:
    with pytest.raises(ShapeError, match="expected even sides"):
        write_media(tmp_path / "a.mp4", frames_of(2, 63, 64))
    with pytest.raises(UsageError, match=r"ends with \.mp4, \.gif, \.png"):
        write_media(tmp_path / "a.mpg", frames_of(1))
    with pytest.raises(UsageError, match="fps is 0"):
        write_media(tmp_path / "a.mp4", frames_of(1), 0)
    with pytest.raises(UsageError, match="at most 100"):
        write_media(tmp_path / "a.gif", frames_of(1), 101)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write_media(tmp_path / "file" / "a.mp4", frames_of(1))
