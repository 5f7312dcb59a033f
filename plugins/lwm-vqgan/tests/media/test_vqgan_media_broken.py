"""Files that are broken, odd, or not what their name says: one line each, and no codes; or codes like any other's."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from lwm_core.errors import DataError
from lwm_core.shards import open_shards
from lwm_vqgan.media import find_sources, open_clip

Pixels = NDArray[np.uint8]


def make_broken(folder: Path, video: Any, frames: list[Pixels]) -> None:
    """The files of the test below."""
    good = video(folder / "good.mp4", frames, container={"movflags": "faststart"}, crf="10").read_bytes()
    late = video(folder / "late.mp4", frames).read_bytes()  # its index is at the end
    (folder / "headless.mp4").write_bytes(late[: len(late) // 2])
    (folder / "text.mp4").write_text("This is a letter, not a film.\n" * 40)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "cut.mp4").write_bytes(good[: len(good) * 2 // 3])
    start = good.index(b"mdat") + 4
    damaged = bytearray(good)
    middle = (start + len(good)) // 2
    damaged[middle : middle + 3000] = np.random.default_rng(0).bytes(3000)
    (folder / "damaged.mp4").write_bytes(damaged)
    (folder / "text.png").write_text("no picture")
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "png")
    (folder / "cut.png").write_bytes(buffer.getvalue()[:4000])
    with av.open(str(folder / "audio.mp4"), "w") as container:
        sound: Any = container.add_stream("aac", rate=44100)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        samples.rate, samples.pts = 44100, 0
        container.mux(sound.encode(samples))
        container.mux(sound.encode(None))
    with av.open(str(folder / "none.avi"), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    (folder / "garbage.mp4").write_bytes(np.random.default_rng(1).bytes(9000))
    for name in ("pipe.mp4", "pipe.png"):
        os.mkfifo(folder / name)
    (folder / "nothing").mkdir()
    (folder / "nothing" / "notes.txt").write_text("no media here")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("text.mp4", "cannot be opened: Invalid data found"),
        ("garbage.mp4", "cannot be opened: Invalid data found"),
        ("pipe.mp4", "is no plain file; expected a video"),
        ("pipe.png", "is no plain file; expected a video"),
        ("empty.mp4", "is empty; expected a video"),
        ("cut.mp4", "cut off"),
        ("headless.mp4", "cannot be opened: Invalid data found"),
        ("damaged.mp4", "is damaged at "),
        ("audio.mp4", "holds no pictures, only audio"),
        ("none.avi", "holds no frames"),
        ("text.png", "is no picture that can be read"),
        ("cut.png", "damaged or cut off"),
        ("missing.mp4", "there is no such file"),
        ("missing.png", "there is no such file"),
        ("nothing", "holds no pictures or videos; expected files such as"),
    ],
)
def test_broken_files_are_one_clear_line(
    name: str, words: str, tmp_path: Path, video: Any, frames_of: Any, here: Any, capfd: Any
) -> None:
    """Each is a DataError that names the file; the command says the same line and nothing else, and makes no codes."""
    make_broken(tmp_path, video, frames_of(80, 160, 120))
    with pytest.raises(DataError) as caught:
        for source in find_sources(tmp_path / name):
            list(open_clip(source.path).frames())
    told = str(caught.value)
    assert told.startswith(f"{tmp_path / name}: ") and words in told and "\n" not in told
    capfd.readouterr()
    assert here("encode", tmp_path / name, "out", "--encoder", "mosaic", "--quiet") == 1
    out, errors = capfd.readouterr()
    assert errors == f"error: {told}\n" and out == ""
    with pytest.raises(DataError, match=r"is no folder of codes|is not complete"):
        open_shards(tmp_path / "out")


def test_odd_shapes_are_encoded_like_any_other(tmp_path: Path, video: Any, frames_of: Any, here: Any) -> None:
    """Portrait, ten bits, one pixel and one row: by the command, as many frames as there are."""
    folder = tmp_path / "odd"
    folder.mkdir()
    video(folder / "portrait.mp4", frames_of(3, 48, 96))
    video(folder / "ten-bit.mp4", frames_of(2), pixels="yuv420p10le")
    Image.new("RGB", (1, 1), (9, 200, 30)).save(folder / "dot.png")
    Image.new("RGB", (400, 1), (9, 200, 30)).save(folder / "row.png")
    assert here("encode", folder, "out", "--encoder", "mosaic", "--quiet") == 0
    found = open_shards(tmp_path / "out", verify=True)
    assert [(one.name, one.frames) for one in found.videos] == [
        ("dot.png", 1), ("portrait.mp4", 3), ("row.png", 1), ("ten-bit.mp4", 2)
    ]  # fmt: skip
    assert (found.codes("dot.png") == found.codes("row.png")).all(), "one colour all over"
    assert len(np.unique(found.codes("portrait.mp4"))) > 4


def test_what_pillow_notes_of_a_damaged_file_is_not_shown(tmp_path: Path) -> None:
    """A picture whose EXIF is broken is read, without a warning that names Pillow's source."""
    path = tmp_path / "noted.jpg"
    Image.new("RGB", (8, 8), (9, 200, 30)).save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with Image.open(path) as picture:
            ImageOps.exif_transpose(picture)
        assert seen, "there is something to note"
        seen.clear()
        assert len(list(open_clip(path).frames())) == 1
    assert seen == []


def test_a_song_with_a_cover_is_audio(tmp_path: Path) -> None:
    """The cover of a song is a picture stream, but no video."""
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        sound: Any = container.add_stream("aac", rate=44100)
        cover: Any = container.add_stream("png", rate=1)
        cover.width = cover.height = 16
        cover.pix_fmt = "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        samples.rate, samples.pts = 44100, 0
        container.mux(sound.encode(samples))
        container.mux(sound.encode(None))
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), "rgb24")))
    with pytest.raises(DataError, match="holds no pictures, only audio"):
        open_clip(tmp_path / "song.mp4")


def test_a_file_is_never_an_address(
    tmp_path: Path, video: Any, frames_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A colon in a name is a colon; a play list that names another protocol is not followed."""
    monkeypatch.chdir(tmp_path)
    video(tmp_path / "plain.mp4", frames_of(2)).rename("http:clip.mp4")
    assert open_clip(Path("http:clip.mp4")).length == 2
    (tmp_path / "list.mp4").write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"
    )
    with pytest.raises(DataError, match=r"list\.mp4"):
        open_clip(Path("list.mp4"))
