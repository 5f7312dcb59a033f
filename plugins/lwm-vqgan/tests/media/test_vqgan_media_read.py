"""Frames of files against what PyAV and Pillow decode directly, and against a scaling written out in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from lwm_core.errors import DataError, LwmError, UsageError
from lwm_vqgan.media import Sampling, find_sources, open_clip, preprocess
from lwm_vqgan.media import read as reading
from lwm_vqgan.media.sampling import at_rate

Pixels = NDArray[np.uint8]


def directly(path: Path) -> list[Pixels]:
    """All frames by PyAV alone, as they are stored."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def bicubic(line: NDArray[np.float64], first: float, last: float, size: int) -> NDArray[np.float64]:
    """``[n, ...]`` → ``[size, ...]``: from ``first`` to ``last`` by Keys' cubic (a = −1/2), widened to shrink."""
    scale = (last - first) / size
    width = max(scale, 1.0)
    out = np.zeros((size, *line.shape[1:]))
    for at in range(size):
        centre = first + (at + 0.5) * scale
        t = np.abs((np.arange(len(line)) + 0.5 - centre) / width)
        inner, outer = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
        weights = np.where(t < 1, inner, np.where(t < 2, outer, 0.0))
        out[at] = np.tensordot(weights / weights.sum(), line, axes=1)
    return out


def scaled(frame: Pixels, size: int) -> NDArray[np.float64]:
    """The centre square of ``frame`` at ``size``, in float64, its borders seeing what lies beyond."""
    height, width = frame.shape[:2]
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    rows = bicubic(frame.astype(np.float64), top, top + side, size)
    return bicubic(rows.swapaxes(0, 1), left, left + side, size).swapaxes(0, 1)


@pytest.mark.parametrize("shape", [(90, 160), (160, 90), (201, 64), (64, 64), (33, 47), (1, 9)], ids=str)
@pytest.mark.parametrize("size", [16, 64])
def test_frames_are_scaled_and_cropped_as_by_hand(shape: tuple[int, int], size: int) -> None:
    """Landscape, portrait, odd, square, enlarged; within 1.5 levels of float64, for Pillow rounds between passes."""
    random = np.random.default_rng(0)
    frame = random.integers(60, 196, (*shape, 3), dtype=np.uint8)  # Pillow clips between its passes; nothing here is
    frame[: shape[0] // 2] -= 20  # so that a turned picture would be seen
    found = preprocess(frame, size)
    assert found.shape == (size, size, 3) and found.dtype == np.uint8
    assert np.abs(found - np.clip(scaled(frame, size), 0, 255)).max() <= 1.51


def test_fine_patterns_do_not_alias() -> None:
    """Stripes of one pixel become grey; taking every fourth pixel would give black or white."""
    frame = np.zeros((256, 400, 3), np.uint8)
    frame[:, ::2] = 255
    inner = preprocess(frame, 64)[8:-8, 8:-8].astype(int)
    assert abs(inner.mean() - 127.5) < 3 and np.ptp(inner) < 12


def test_it_is_what_lwm_does() -> None:
    """Its ``vision_chat`` scales all of the picture by Pillow, then crops; where sides divide, not a bit differs."""
    frame = np.random.default_rng(1).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    theirs = Image.fromarray(frame).resize((320, 240)).crop((40, 0, 280, 240))
    assert (preprocess(frame, 240) == np.asarray(theirs)).all()


@given(
    st.lists(st.integers(1, 50), min_size=0, max_size=40), st.integers(-20, 20), st.integers(1, 60),
    st.sampled_from([0.5, 1.0, 4.0, 12.5, 23.976, 30.0]),
    st.sampled_from([Fraction(1, 25), Fraction(1, 90), Fraction(1001, 30000)]),
)  # fmt: skip
def test_at_each_tick_the_frame_shown_then(gaps: list[int], first: int, last: int, fps: float, base: Fraction) -> None:
    times = np.array([*itertools.accumulate(gaps, initial=first)], np.int64)
    end = int(times[-1]) + last
    found = at_rate(times, end, base, fps)
    expected, tick = [], Fraction(0)
    while tick < (end - first) * base or not expected:
        expected.append(max(i for i, one in enumerate(times.tolist()) if (one - first) * base <= tick))
        tick += 1 / Fraction(str(fps))
    assert found.tolist() == expected


KINDS: dict[str, dict[str, Any]] = {
    "a.mp4": {},
    "b-frames.mp4": {"gop": 250, "bf": "3"},
    "ten-bit.mp4": {"pixels": "yuv420p10le"},
    "hevc.mkv": {"codec": "libx265", "pixels": "yuv420p10le", "x265-params": "log-level=none"},
    "a.webm": {"codec": "libvpx-vp9", "deadline": "realtime", "cpu-used": "8"},
    "a.mkv": {"codec": "ffv1", "pixels": "yuv444p"},
    "a.avi": {"codec": "mpeg4"},
    "a.gif": {"codec": "gif", "pixels": "rgb8"},
    "a.ts": {},
    "a.h264": {"format": "h264"},
    "a.mov": {"codec": "mjpeg", "pixels": "yuvj420p"},
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file(name: str, tmp_path: Path, video: Any, frames_of: Any) -> None:
    """All frames, some by number, some by rate: the pixels that PyAV decodes from the start, at their times."""
    path = video(tmp_path / name, frames_of(60), **KINDS[name])
    whole = directly(path)
    clip = open_clip(path)
    found = list(clip.frames())
    assert len(found) == len(whole) == clip.length == 60 and clip.fps == 25
    assert all((one.pixels == other).all() for one, other in zip(found, whole, strict=True))
    assert [one.time for one in found] == pytest.approx([number / 25 for number in range(60)], abs=1e-6)
    for sampling, expected in (
        (Sampling(frames=7), np.linspace(0, 59, 7).astype(int).tolist()),
        (Sampling(fps=4), [25 * tick // 4 for tick in range(10)]),
        (Sampling(fps=50), [tick // 2 for tick in range(120)]),
    ):
        clip = open_clip(path, sampling)
        some = list(clip.frames())
        assert clip.length == len(some) == len(expected) and clip.fps == sampling.fps
        assert all((one.pixels == whole[number]).all() for one, number in zip(some, expected, strict=True))
        rest = list(clip.frames(3))
        assert all((one.pixels == other.pixels).all() for one, other in zip(rest, some[3:], strict=True))


def test_a_video_of_changing_pace(tmp_path: Path, video: Any, frames_of: Any) -> None:
    """Frames at 0, 1, 2, 10, 11 and 30 twentieths of a second: each tick shows the frame that stands then."""
    path = video(
        tmp_path / "slides.mkv", frames_of(6), codec="ffv1", pixels="bgr0", rate=20, times=[0, 1, 2, 10, 11, 30]
    )
    found = list(open_clip(path, Sampling(fps=4)).frames())
    assert [round(one.time * 20) for one in found] == [0, 2, 10, 11, 11, 11, 30]
    assert [round(one.time * 20) for one in open_clip(path).frames()] == [0, 1, 2, 10, 11, 30]


@pytest.mark.parametrize(
    ("turn", "shown"),
    [
        ((90,), lambda one: np.rot90(one, 1)),
        ((-90,), lambda one: np.rot90(one, -1)),
        ((180,), lambda one: np.rot90(one, 2)),
        ((0, True, False), lambda one: one[:, ::-1]),
        ((0, False, True), lambda one: one[::-1]),
    ],
)
def test_turned_and_mirrored_video_is_upright(
    turn: Any, shown: Callable[[Pixels], Pixels], tmp_path: Path, video: Any, frames_of: Any
) -> None:
    """A phone's portrait video: stored lying, its display matrix (counter-clockwise degrees) says how it is shown."""
    path = video(tmp_path / "turned.mp4", frames_of(3), turn=turn)
    stored = directly(path)
    assert all((one.pixels == shown(other)).all() for one, other in zip(open_clip(path).frames(), stored, strict=True))


def test_a_slanting_video_is_refused(tmp_path: Path, video: Any, frames_of: Any) -> None:
    path = video(tmp_path / "slanting.mp4", frames_of(2), turn=(30,))
    with pytest.raises(DataError, match=r"slanting\.mp4: it is turned by an angle that is no multiple of 90°"):
        list(open_clip(path).frames())


def test_the_colours_of_hd_are_its_own(tmp_path: Path) -> None:
    """Video that says BT.709 is read by BT.709's matrix: a red comes back as it was, to rounding."""
    red = np.full((64, 64, 3), (200, 30, 40), np.uint8)
    with av.open(str(tmp_path / "hd.mp4"), "w") as container:
        stream: Any = container.add_stream("libx264", rate=4, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = 1, 1
        frame = av.VideoFrame.from_ndarray(red, "rgb24").reformat(format="yuv420p", dst_colorspace=1, dst_color_range=1)
        frame.pts = 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    (found,) = open_clip(tmp_path / "hd.mp4").frames()
    assert np.abs(found.pixels.astype(int) - red).max() <= 3


def test_far_apart_frames_are_reached_by_jumping(
    tmp_path: Path, video: Any, frames_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five frames of four minutes: no more is decoded than from each one's keyframe, and all is what PyAV decodes."""
    path = video(tmp_path / "long.mp4", (one for one in frames_of(20) for _ in range(60)), rate=5, gop=20)
    whole = directly(path)
    decoded = []
    before = reading._decoded

    def counted(*args: Any) -> Any:
        for one in before(*args):
            decoded.append(one[0])
            yield one

    monkeypatch.setattr(reading, "_decoded", counted)
    clip = open_clip(path, Sampling(frames=5))
    found = list(clip.frames())
    assert all((one.pixels == whole[at]).all() for one, at in zip(found, clip.indices, strict=True))  # type: ignore[arg-type]
    assert len(decoded) <= 5 * 21 and clip.length == 5
    # All of it: a new run each minute, so that what starts in the middle decodes a minute more at most.
    clip = open_clip(path)
    assert 3 <= len(reading.runs(clip.scan, clip.indices)) <= 5  # type: ignore[arg-type]
    decoded.clear()
    rest = list(clip.frames(1100))
    assert len(decoded) <= 100 + 60 * 5 + 25
    assert all((one.pixels == other).all() for one, other in zip(rest, whole[1100:], strict=True))


def test_a_broadcast_that_begins_in_the_middle(tmp_path: Path, video: Any, frames_of: Any) -> None:
    """A recording cut out of an MPEG-TS: what comes before the first keyframe does not decode, and is not promised."""
    path = video(tmp_path / "whole.ts", frames_of(100, 320, 240), gop=30)
    data = path.read_bytes()
    (tmp_path / "part.ts").write_bytes(data[len(data) // 188 // 5 * 188 :])
    clip = open_clip(tmp_path / "part.ts")
    found = list(clip.frames())
    whole = directly(path)
    assert 40 <= len(found) == clip.length < 90
    assert all((one.pixels == other).all() for one, other in zip(found, whole[-len(found) :], strict=True))


def test_pictures(tmp_path: Path) -> None:
    """Each is one frame: png without its alpha, jpg turned as its EXIF says, webp, 16-bit grey, a gif, one pixel."""
    picture = np.zeros((20, 30, 3), np.uint8)
    picture[:10, :15] = (250, 10, 20)
    image = Image.fromarray(picture)
    image.save(tmp_path / "a.png")
    image.convert("RGBA").save(tmp_path / "alpha.png")
    image.save(tmp_path / "a.webp", lossless=True)
    image.save(tmp_path / "a.bmp")
    image.quantize(4).save(tmp_path / "a.gif")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    image.save(tmp_path / "turned.jpg", quality=95, exif=exif)
    for name in ("a.png", "alpha.png", "a.webp", "a.bmp", "a.gif"):
        clip = open_clip(tmp_path / name, Sampling(fps=4) if name != "a.gif" else None)
        (frame,) = clip.frames()
        assert (frame.pixels == picture).all() and frame.time == 0 and clip.length == 1, name
        assert list(clip.frames(1)) == []
    (frame,) = open_clip(tmp_path / "turned.jpg").frames()
    assert frame.pixels.shape == (30, 20, 3)
    assert np.abs(frame.pixels.astype(int) - np.rot90(picture, -1)).mean() < 8
    deep = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    (frame,) = open_clip(tmp_path / "deep.png").frames()
    assert np.abs(frame.pixels[..., 0] - deep / 257).max() <= 0.5
    Image.fromarray(picture[:1, :1]).save(tmp_path / "dot.png")
    (frame,) = open_clip(tmp_path / "dot.png").frames()
    assert (preprocess(frame.pixels, 64) == picture[0, 0]).all()


def test_a_video_of_one_pixel(tmp_path: Path, video: Any) -> None:
    dots = [np.full((1, 1, 3), (number, 9, 200), np.uint8) for number in range(5)]
    path = video(tmp_path / "dot.mkv", dots, codec="ffv1", pixels="bgr0")
    found = [preprocess(one.pixels, 64) for one in open_clip(path).frames()]
    assert all((one == dot).all() for one, dot in zip(found, dots, strict=True))


def test_folders_are_listed_in_one_order(tmp_path: Path) -> None:
    for name in ("b/2.MP4", "b/10.png", "a.gif", ".hidden/x.mp4", "b/.y.png", "notes.txt", "Z.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert [one.name for one in find_sources(tmp_path)] == ["Z.jpg", "a.gif", "b/10.png", "b/2.MP4"]


@pytest.mark.parametrize("wrong", [{"frames": 0}, {"fps": 0.0}, {"fps": float("nan")}, {"frames": 2, "fps": 1.0}])
def test_wrong_sampling_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Sampling(**wrong)
    assert issubclass(UsageError, LwmError)
