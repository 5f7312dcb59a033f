"""The reader of folders of codes, on one that is written here by hand, as the layout's page says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from lwm_core.errors import DataError, UsageError
from lwm_core.shards import Settings, open_shards

CODES = np.random.default_rng(0).integers(0, 9, (5, 4)).astype("<u2")
TIMES = np.array([0.0, 0.0, 0.25, 0.5, 0.75])
LINES = [
    {"name": "one.png", "size": 7, "start": 0, "frames": 1, "fps": None, "broken": ""},
    {"name": "b/two.mp4", "size": 70, "start": 1, "frames": 4, "fps": 4.0, "broken": ""},
]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A picture and a video of four frames in shards of three rows."""
    shards = []
    for number, rows in enumerate((slice(0, 3), slice(3, 5))):
        data = save({"codes": CODES[rows], "times": TIMES[rows]})
        name = f"0000{number}.safetensors"
        (tmp_path / name).write_bytes(data)
        shards.append({"file": name, "frames": len(CODES[rows]), "size": len(data), "sha256": sha256(data)})
    lines = "".join(json.dumps(line) + "\n" for line in LINES).encode()
    (tmp_path / "videos.jsonl").write_bytes(lines)
    manifest: dict[str, Any] = {
        "format": 1, "complete": True, "tokens_per_frame": 4, "frames": 5, "videos": 2, "videos_size": len(lines),
        "videos_sha256": sha256(lines), "current": None, "shards": shards,
        "settings": {"encoder": "a:b", "checksum": "0" * 64, "options": {}, "codes": 9, "frame_size": 16,
                     "frames": None, "fps": 4.0, "batch": 1, "shard_frames": 3},
    }  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def test_frames_of_any_video_are_mapped(folder: Path) -> None:
    shards = open_shards(folder, verify=True)
    assert shards.manifest.settings == Settings("a:b", "0" * 64, {}, 9, 16, None, 4.0, 1, 3)
    assert [(video.name, video.frames, video.fps) for video in shards.videos] == [
        ("one.png", 1, None), ("b/two.mp4", 4, 4.0)
    ]  # fmt: skip
    assert np.array_equal(shards.codes("one.png"), CODES[:1]) and np.array_equal(shards.codes(1), CODES[1:])
    assert np.array_equal(shards.codes(1, 1, 3), CODES[2:4]) and shards.times(1).tolist() == TIMES[1:].tolist()
    assert isinstance(shards.codes(1, 0, 2), np.memmap)


def test_what_is_not_there_or_not_whole_is_one_line(folder: Path) -> None:
    shards = open_shards(folder)
    with pytest.raises(UsageError, match=r"there is no video 'two.mp4'; expected one of one.png, b/two.mp4"):
        shards.codes("two.mp4")
    second = folder / "00001.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataError, match=r"00001.safetensors: was changed: its SHA-256"):
        open_shards(folder, verify=True)
    second.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"00001.safetensors: has \d+ bytes; its manifest says"):
        open_shards(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    with pytest.raises(DataError, match="is not complete: 5 frames so far"):
        open_shards(folder)
