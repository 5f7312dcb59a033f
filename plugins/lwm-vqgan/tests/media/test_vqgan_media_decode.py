"""``lwm decode``: codes back to files, from folders and from plain arrays."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from lwm_core.shards import open_shards

ENCODE = ("--encoder", "mosaic", "--quiet")


@pytest.fixture
def clip(tmp_path: Path, video: Any, frames_of: Any, here: Any) -> Path:
    """A folder of the codes of one video, 40 frames at 10 a second."""
    path = video(tmp_path / "clip.mp4", frames_of(40, 64, 64), rate=10)
    assert here("encode", path, "codes", *ENCODE, "--batch", 8, "--shard-frames", 16) == 0
    return tmp_path / "codes"


def painted(codes: Any) -> Any:
    """What the stand-in paints, written out again."""
    out = np.zeros((len(codes), 64, 64, 3), np.uint8)
    for number, row in enumerate(np.asarray(codes, int)):
        for at, code in enumerate(row):
            top, left = 16 * (at // 4), 16 * (at % 4)
            out[number, top : top + 16, left : left + 16] = [
                16 * (code >> 8) + 8,
                16 * (code >> 4 & 15) + 8,
                16 * (code & 15) + 8,
            ]
    return out


def test_a_folder_back_to_video(clip: Path, here: Any, tmp_path: Path, capsys: Any) -> None:
    """As many frames as were encoded, at the rate they were taken, near what the encoder paints; it is known."""
    expected = painted(open_shards(clip).codes(0))
    capsys.readouterr()
    assert here("decode", clip, "out.mp4", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"out": "out.mp4", "frames": 40, "fps": 10}
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.video[0].average_rate == 10
        found = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(found) == 40
    assert np.mean((np.array(found).astype(float) - expected) ** 2) < 255**2 / 10**2.5  # 25 dB
    assert here("decode", clip, "out.gif", "--fps", "5", "--batch", "3") == 0
    with av.open(str(tmp_path / "out.gif")) as container:
        found = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 5
    assert (
        np.abs(np.array(found).astype(int) - expected).max() <= 3
    )  # FFmpeg chooses the palette in another colour space
    assert here("decode", clip, "out.png", "--frame", "17") == 0
    assert (np.asarray(Image.open(tmp_path / "out.png")) == expected[17]).all()


def test_plain_arrays(tmp_path: Path, here: Any) -> None:
    codes = np.random.default_rng(0).integers(0, 4096, (5, 16))
    np.save(tmp_path / "a.npy", codes)
    save_file({"codes": codes.astype(np.int32)}, tmp_path / "a.safetensors")
    for name in ("a.npy", "a.safetensors"):
        assert here("decode", name, "out.png", "--encoder", "mosaic", "--frame", "4") == 0
        assert (np.asarray(Image.open(tmp_path / "out.png")) == painted(codes)[4]).all()
    assert here("decode", "a.npy", "out.mp4", "--encoder", "mosaic") == 0
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.video[0].average_rate == 4 and sum(1 for _ in container.decode(video=0)) == 5


def test_one_video_of_many(clip: Path, here: Any, tmp_path: Path, frames_of: Any, capsys: Any) -> None:
    (tmp_path / "many").mkdir()
    for number in range(3):
        Image.fromarray(frames_of(1, 64, 64, seed=number)[0]).save(tmp_path / "many" / f"{number}.png")
    assert here("encode", "many", "set", *ENCODE) == 0
    assert here("decode", "set", "a.png") == 2
    assert "set: holds 3 videos; name one with --video" in capsys.readouterr().err
    assert here("decode", "set", "a.png", "--video", "2") == 0
    assert here("decode", "set", "b.png", "--video", "2.png") == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (np.asarray(Image.open(tmp_path / "a.png")) == painted(open_shards(tmp_path / "set").codes(2))[0]).all()


def test_wrong_ways(clip: Path, here: Any, tmp_path: Path, capsys: Any) -> None:
    """One line each, with what to do, and no file."""
    np.save(tmp_path / "high.npy", np.full((2, 16), 4096))
    np.save(tmp_path / "floats.npy", np.zeros((2, 16)))
    np.save(tmp_path / "object.npy", np.array([{"a": 1}], object), allow_pickle=True)
    save_file({"other": np.zeros((2, 16), np.int32)}, tmp_path / "other.safetensors")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    mosaic = ("--encoder", "mosaic")
    for words, code, told in (
        ((clip, "o.png"), 2, "o.png: a png holds one frame of 40; name it with --frame"),
        ((clip, "o.mp4", "--frame", "40"), 2, "--frame is 40; expected 0 to 39"),
        ((clip, "o.mp4", "--video", "x"), 2, f"{clip}: there is no video 'x'; expected one of clip.mp4"),
        ((clip, "o.mp4", "-s", "weights=b"), 1, f"{clip}: its codes are of lwm-mosaic:mosaic ca978112ca1b, but"),
        ((clip, "o.avi"), 2, "o.avi: expected a name that ends with .mp4, .gif, .png"),
        (("nowhere", "o.mp4"), 1, "nowhere: there is no such file or folder"),
        (("high.npy", "o.mp4", *mosaic), 1, "high.npy: has codes from 4096 to 4096; lwm-mosaic:mosaic has 0 to 4095"),
        (("floats.npy", "o.mp4", *mosaic), 1, "floats.npy: holds float64 [2, 16]; expected whole numbers"),
        (("object.npy", "o.mp4", *mosaic), 1, "object.npy: cannot be read: Array can't be memory-mapped"),
        (("other.safetensors", "o.mp4", *mosaic), 1, "other.safetensors: holds no array 'codes'"),
        (("cut.safetensors", "o.mp4", *mosaic), 1, "cut.safetensors: cannot be read"),
        (("notes.txt", "o.mp4", *mosaic), 1, "notes.txt: expected a folder of codes, a .npy or a .safetensors"),
        (("high.npy", "o.mp4", "--video", "1", *mosaic), 2, "--video: high.npy is a file of one video"),
    ):
        capsys.readouterr()
        assert here("decode", *words) == code, words
        errors = capsys.readouterr().err
        assert errors.startswith(f"error: {told}") and errors.count("\n") == 1, errors
    assert not list(tmp_path.glob("o.*"))


def test_the_specs_import_nothing_heavy() -> None:
    heavy = "('av', 'numpy', 'PIL', 'pydantic', 'safetensors', 'rich')"
    code = (
        "import sys, argparse, lwm_vqgan._lwm_media, lwm_vqgan.encode_verb as e, lwm_vqgan.decode_verb as d\n"
        "verbs = argparse.ArgumentParser().add_subparsers()\ne.add_encode(verbs), d.add_decode(verbs)\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
