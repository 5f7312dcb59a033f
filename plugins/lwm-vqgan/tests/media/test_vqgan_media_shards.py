"""Folders of codes: what is in them against the encoder asked directly, any frame of any video, and damage."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file

from lwm_core.errors import DataError, LwmError, UsageError
from lwm_core.shards import Settings, open_shards
from lwm_vqgan.media import preprocess
from lwm_vqgan.media.files import Source
from lwm_vqgan.shards.writer import ShardWriter

ENCODE = ("--encoder", "mosaic", "--quiet")


def mosaic(frames: list[NDArray[np.uint8]]) -> NDArray[np.int64]:
    """The stand-in's codes written out again: mean colour of each of 4 × 4 squares, four bits a channel."""
    rows = []
    for frame in frames:
        frame = preprocess(frame, 64)
        squares = [frame[16 * i : 16 * i + 16, 16 * j : 16 * j + 16] for i in range(4) for j in range(4)]
        means = [square.reshape(-1, 3).mean(0).astype(int) // 16 for square in squares]
        rows.append([256 * red + 16 * green + blue for red, green, blue in means])
    return np.array(rows)


def directly(path: Path) -> list[NDArray[np.uint8]]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.fixture
def folder(tmp_path: Path, video: Any, frames_of: Any) -> Path:
    """Two videos and three pictures."""
    folder = tmp_path / "in"
    (folder / "b").mkdir(parents=True)
    video(folder / "b" / "tall.mp4", frames_of(50, 48, 80, seed=1))
    video(folder / "wide.webm", frames_of(9, 80, 48, seed=2), codec="libvpx-vp9", deadline="realtime")
    for number in range(3):
        Image.fromarray(frames_of(1, 70, 50, seed=3 + number)[0]).save(folder / f"{number}.png")
    return folder


def test_codes_of_a_folder(folder: Path, here: Any, tmp_path: Path, capsys: Any) -> None:
    """Five files in shards of eight rows: every (video, frame) is what the encoder says of PyAV's own pixels."""
    assert here("encode", folder, "out", *ENCODE, "--batch", 4, "--shard-frames", 8, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["videos"], told["frames"], told["tokens"], told["shards"]) == (5, 62, 62 * 16, 8)
    shards = open_shards(tmp_path / "out", verify=True)
    assert [video.name for video in shards.videos] == ["0.png", "1.png", "2.png", "b/tall.mp4", "wide.webm"]
    assert [video.frames for video in shards.videos] == [1, 1, 1, 50, 9]
    assert [video.fps for video in shards.videos] == [None, None, None, 25, 25]
    every = []
    for number, video in enumerate(shards.videos):
        path = folder / video.name
        picture = path.suffix == ".png"
        expected = mosaic([np.asarray(Image.open(path))] if picture else directly(path))
        assert (shards.codes(number) == expected).all() and shards.codes(video.name).dtype == np.uint16
        assert shards.times(number) == pytest.approx([at / 25 for at in range(video.frames)], abs=1e-3)
        for at in range(video.frames):
            assert (shards.codes(number, at, at + 1) == expected[at : at + 1]).all()
        every.append(expected)
    assert (shards.rows(0, 62) == np.concatenate(every)).all() and len(shards) == 62
    assert isinstance(shards.rows(9, 15), np.memmap), "rows of one shard are mapped, not copied"
    assert shards.codes(0, 1, 1).shape == (0, 16)
    copied = pickle.dumps(shards)
    assert len(copied) < 10_000 and (pickle.loads(copied).rows(5, 40) == shards.rows(5, 40)).all()
    assert load_file(tmp_path / "out" / "00001.safetensors")["codes"].shape == (8, 16)  # as any other program reads it


def test_pictures_are_batched_and_nothing_depends_on_shards(folder: Path, here: Any, tmp_path: Path) -> None:
    assert here("encode", folder, "one", *ENCODE, "--batch", 1, "--shard-frames", 1) == 0
    assert here("encode", folder, "many", *ENCODE, "--batch", 32) == 0
    one, many = open_shards(tmp_path / "one"), open_shards(tmp_path / "many")
    assert (one.rows(0, 62) == many.rows(0, 62)).all() and one.videos == many.videos
    assert len(one.manifest.shards) == 62 and len(many.manifest.shards) == 1


def test_sampling_options(tmp_path: Path, video: Any, frames_of: Any, here: Any) -> None:
    path = video(tmp_path / "a.mp4", frames_of(50))
    whole = mosaic(directly(path))
    assert here("encode", path, "some", *ENCODE, "--frames", 5) == 0
    assert here("encode", path, "rate", *ENCODE, "--fps", 4) == 0
    some, rate = open_shards(tmp_path / "some"), open_shards(tmp_path / "rate")
    assert (some.codes(0) == whole[[0, 12, 24, 36, 49]]).all() and some.videos[0].fps is None
    assert (rate.codes(0) == whole[[0, 6, 12, 18, 25, 31, 37, 43]]).all() and rate.videos[0].fps == 4
    assert rate.times(0).tolist() == pytest.approx([at / 25 for at in (0, 6, 12, 18, 25, 31, 37, 43)])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("-s", "weights=b"), "checksum"),
        (("--fps", "2"), "fps"),
        (("--frames", "3"), "frames"),
        (("--batch", "8"), "batch"),
        (("--shard-frames", "32"), "shard_frames"),
        (("-s", "frame_size=32"), "options"),
    ],
)
def test_going_on_with_something_else_is_refused(
    change: tuple[str, ...],
    words: str,
    tmp_path: Path,
    video: Any,
    frames_of: Any,
    here: Any,
    capsys: Any,
    files_in: Any,
) -> None:
    """Another encoder, weights, sampling or cut: one line that names what differs, and nothing is changed."""
    path = video(tmp_path / "a.mp4", frames_of(4))
    assert here("encode", path, "out", *ENCODE) == 0
    before = files_in(tmp_path / "out")
    capsys.readouterr()
    assert here("encode", path, "out", *ENCODE, *change) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and f"was begun with {words}" in errors
    assert files_in(tmp_path / "out") == before


def test_other_sources_are_refused(
    folder: Path, tmp_path: Path, here: Any, capsys: Any, video: Any, frames_of: Any
) -> None:
    assert here("encode", folder, "out", *ENCODE) == 0
    assert here("encode", folder, "out", *ENCODE) == 0, "the same again is nothing to do"
    shutil.copy(folder / "2.png", folder / "zz.png")
    assert here("encode", folder, "out", *ENCODE) == 2
    assert "is complete with 5 files, and zz.png is not among them" in capsys.readouterr().err
    (folder / "zz.png").unlink()
    video(folder / "wide.webm", frames_of(4, seed=9), codec="libvpx-vp9", deadline="realtime")
    assert here("encode", folder, "out", *ENCODE) == 2
    assert "out: file 5 was wide.webm (" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert here("encode", folder, "mine", *ENCODE) == 2
    assert "mine: holds thesis.txt and no manifest.json" in capsys.readouterr().err
    assert here("encode", folder, "mine/thesis.txt", *ENCODE) == 2
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_a_broken_file_among_good_ones(folder: Path, tmp_path: Path, here: Any, capsys: Any, files_in: Any) -> None:
    """It ends the work, and what came before it is kept; with --skip-broken it is noted, and the rest is encoded."""
    data = (folder / "b" / "tall.mp4").read_bytes()
    damaged = bytearray(data)
    damaged[len(data) // 2 : len(data) // 2 + 400] = np.random.default_rng(0).bytes(400)
    (folder / "b" / "tall.mp4").write_bytes(damaged)
    (folder / "1.png").write_text("no picture")
    assert here("encode", folder, "out", *ENCODE, "--batch", 1) == 1
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "1.png: is no picture" in errors
    assert [video.name for video in open_shards(tmp_path / "out", incomplete=True).videos] == ["0.png"]
    with pytest.raises(DataError, match="is not complete: 1 frames so far"):
        open_shards(tmp_path / "out")
    assert here("encode", folder, "out", *ENCODE, "--batch", 1, "--skip-broken", "--json") == 1
    told = capsys.readouterr()
    assert [one["name"] for one in json.loads(told.out)["broken"]] == ["1.png", "b/tall.mp4"]
    assert told.err.splitlines()[0].startswith("1.png: is no picture") and "left out" in told.err
    shards = open_shards(tmp_path / "out", verify=True)
    assert [video.name for video in shards.videos if not video.broken] == ["0.png", "2.png", "wide.webm"]
    tall = shards.video("b/tall.mp4")
    assert 0 < tall.frames < 50 and "damaged at" in tall.broken and shards.video("1.png").frames == 0
    assert (shards.codes("b/tall.mp4") == mosaic(directly_until(folder / "b" / "tall.mp4", tall.frames))).all()
    assert here("encode", folder, "again", *ENCODE, "--batch", 1, "--skip-broken") == 1
    assert files_in(tmp_path / "again") == files_in(tmp_path / "out")


def directly_until(path: Path, count: int) -> list[NDArray[np.uint8]]:
    with av.open(str(path)) as container:
        frames = container.decode(video=0)
        return [next(frames).to_ndarray(format="rgb24") for _ in range(count)]


def test_damaged_folders_are_one_clear_line(folder: Path, tmp_path: Path, here: Any) -> None:
    assert here("encode", folder, "out", *ENCODE, "--batch", 4, "--shard-frames", 8) == 0
    out = tmp_path / "out"
    whole = {path.name: path.read_bytes() for path in out.iterdir()}

    def after(name: str, data: bytes | None, verify: bool = False) -> str:
        for file, content in whole.items():
            (out / file).write_bytes(content)
        (out / name).unlink() if data is None else (out / name).write_bytes(data)
        with pytest.raises(DataError) as caught:
            open_shards(out, verify=verify).rows(0, 62)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    third = whole["00002.safetensors"]
    flipped = bytes([*third[:-1], third[-1] ^ 1])
    assert "00002.safetensors: is missing" in after("00002.safetensors", None)
    assert "00002.safetensors: has 100 bytes" in after("00002.safetensors", third[:100])
    assert "00002.safetensors: was changed" in after("00002.safetensors", flipped, verify=True)
    assert "00002.safetensors: cannot be read" in after("00002.safetensors", b"\xff" * len(third))
    assert "manifest.json: cannot be read" in after("manifest.json", b"{}")
    assert "manifest.json: is of another format" in after("manifest.json", b'{"format": 99}')
    assert "is no folder of codes" in after("manifest.json", None)
    assert "videos.jsonl: has 3 bytes" in after("videos.jsonl", b"abc")
    assert "videos.jsonl: cannot be read" in after("videos.jsonl", b"x" * len(whole["videos.jsonl"]))
    lines = whole["videos.jsonl"].replace(b"wide", b"w1de")
    assert "videos.jsonl: was changed" in after("videos.jsonl", lines, verify=True)
    with pytest.raises(DataError, match="is no folder of codes"):
        open_shards(tmp_path / "nowhere")


def test_no_such_video_or_frame(folder: Path, tmp_path: Path, here: Any) -> None:
    assert here("encode", folder, "out", *ENCODE) == 0
    shards = open_shards(tmp_path / "out")
    for ask, words in (
        (lambda: shards.codes(5), "there is no video 5; expected 0 to 4"),
        (lambda: shards.codes("tall"), "there is no video 'tall'; expected one of 0.png"),
        (lambda: shards.codes("b/tall.mp4", 3, 51), "no frames 3 to 51; expected 0 to 50"),
        (lambda: shards.rows(-1, 4), "no rows -1 to 4"),
    ):
        with pytest.raises(UsageError, match=words):
            ask()


def test_an_encoder_that_lies_is_found_out(folder: Path, here: Any, capsys: Any) -> None:
    assert here("encode", folder, "out", "--encoder", "liar", "--quiet") == 2
    assert "encoder 'lwm-mosaic:liar' gave codes from" in capsys.readouterr().err


def test_a_full_disk_keeps_what_was_committed(
    folder: Path, tmp_path: Path, here: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch, files_in: Any
) -> None:
    """One line, nothing lost, and with room again the same command ends as if nothing had been."""
    from lwm_vqgan.shards import writer as writing

    words = ("encode", folder, "out", *ENCODE, "--batch", 4, "--shard-frames", 8)
    before = writing.write_whole

    def full(path: Path, data: bytes) -> None:
        if path.name.startswith("00004"):
            raise OSError(28, "No space left on device")
        before(path, data)

    monkeypatch.setattr(writing, "write_whole", full)
    assert here(*words) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: out: cannot be written: No space left on device; 32 frames are safe, and the same")
    assert errors.count("\n") == 1
    assert len(open_shards(tmp_path / "out", incomplete=True, verify=True)) == 32
    monkeypatch.setattr(writing, "write_whole", before)
    assert here(*words) == 0
    assert here("encode", folder, "whole", *words[3:]) == 0
    assert files_in(tmp_path / "out") == files_in(tmp_path / "whole")


def test_a_disk_that_takes_no_more(folder: Path, tmp_path: Path, lwm: Any, files_in: Any) -> None:
    """By the kernel, in a process of its own: a file may have 1000 bytes, which a shard of 30 frames has not."""
    resource = pytest.importorskip("resource")
    words = ("encode", folder, "out", *ENCODE, "--batch", 4, "--shard-frames", 400)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # noqa: E731
    done = subprocess.run(lwm.arguments(*words), cwd=tmp_path, env=lwm.env, capture_output=True, text=True,
                          check=False, preexec_fn=limit)  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        "error: out: cannot be written: File too large; 0 frames are safe, and the same command goes on from there\n"
    )
    with pytest.raises(DataError, match="is not complete"):
        open_shards(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.partial"))
    assert lwm(*words).returncode == 0
    assert len(open_shards(tmp_path / "out", verify=True)) > 30


SETTINGS = Settings("a:b", "0" * 64, {}, 4096, 64, None, None, 2, 6)
STEP = st.tuples(st.integers(0, 7), st.booleans(), st.booleans())


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the disk."""
    monkeypatch.setattr("lwm_vqgan.shards.disk.os.fsync", lambda file: None)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(STEP, min_size=1, max_size=8), st.integers(0, 2**32 - 1))
def test_commits_and_restarts_leave_no_trace(
    unsynced: None, tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, bool, bool]], seed: int
) -> None:
    """Videos of any lengths, committed and reopened anywhere: the bytes of one that was filled at once."""
    random = np.random.default_rng(seed)
    rows = random.integers(0, 4096, (sum(2 * count for count, _, _ in steps), 16))
    times = np.arange(len(rows)) / 4

    def fill(folder: Path, disturbed: bool) -> dict[str, bytes]:
        writer, at = ShardWriter(folder, SETTINGS), 0
        for number, (count, commits, restarts) in enumerate(steps):
            source = Source(Path("x"), f"{number}.mp4", number)
            writer.begin(source)
            for part in range(count):
                writer.add(rows[at : at + 2], times[at : at + 2])
                writer.count(2)
                at += 2
                if writer.waiting == 6 or (disturbed and commits and part % 2):
                    writer.commit()
                if disturbed and restarts and commits and part % 2:
                    writer = ShardWriter(folder, SETTINGS)
                    writer.begin(source)
            writer.end(4.0)
        writer.commit(complete=True)
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    whole = fill(tmp_path_factory.mktemp("whole"), False)
    folder = tmp_path_factory.mktemp("disturbed")
    assert fill(folder, True) == whole
    shards = open_shards(folder, verify=True)
    assert [video.frames for video in shards.videos] == [2 * count for count, _, _ in steps]
    assert not len(rows) or (shards.rows(0, len(rows)) == rows).all()


def test_options_that_make_no_sense(folder: Path, here: Any, capsys: Any) -> None:
    for words, told in (
        (("--batch", "0"), "--batch is 0; expected at least 1"),
        (("--shard-frames", "10", "--batch", "4"), "--shard-frames is 10; expected a multiple of --batch 4"),
        (("--fps", "0"), "fps is 0; expected a number above 0"),
        (("-s", "frame_size=0"), "-s frame_size=0: expected a number greater than 0, got 0"),
        (
            ("-s", "frame_sise=8"),
            "-s frame_sise=8: unknown option of 'mosaic' (lwm-mosaic 0.1.0); did you mean frame_size?",
        ),
        (("--encoder", "nowhere"), "encoder 'nowhere' is unknown; installed: liar, mosaic"),
    ):
        assert here("encode", folder, "out", *ENCODE, *words) == 2
        assert capsys.readouterr().err.startswith(f"error: {told}")
    assert issubclass(UsageError, LwmError) and not (folder.parent / "out").exists()
