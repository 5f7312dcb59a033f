"""The media plugin ``files``, as the core's verbs find and use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lwm_core.errors import DataError, UsageError
from lwm_core.pipeline import make, plug
from lwm_core.protocols import Media
from lwm_core.registry import Registry
from lwm_vqgan.media import Sampling, open_clip, preprocess


@pytest.fixture
def media() -> Any:
    registry = Registry.from_environment()
    plugged = plug("media", "auto", registry=registry)
    assert plugged.label == "lwm-vqgan:files"
    return make(plugged, registry=registry)


def noise(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, 30, 50, 3), np.uint8))


def test_what_it_writes_it_opens(media: Any, tmp_path: Path) -> None:
    assert isinstance(media, Media)
    for suffix in (*media.stills, *media.videos):
        path, count = tmp_path / f"x{suffix}", 1 if suffix in media.stills else 12
        assert media.write(path, iter(noise(count)), 4.0) == count
        clip = media.open(path)
        assert (clip.path, clip.length, clip.still) == (path, count, suffix in media.stills)
        assert [frame.shape for frame in clip.squares(16)] == [(16, 16, 3)] * count


def test_frames_are_those_that_lwm_encode_takes(media: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.mp4"
    media.write(path, noise(12), 4.0)
    for asked, sampling in (({"frames": 5}, Sampling(frames=5)), ({"fps": 2.0}, Sampling(fps=2.0))):
        expected = [preprocess(frame.pixels, 16) for frame in open_clip(path, sampling).frames()]
        clip = media.open(path, **asked)
        assert clip.length == len(expected) > 1
        assert np.array_equal(np.stack(list(clip.squares(16))), np.stack(expected))


def test_wrong_use_is_told(media: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        media.open(tmp_path / "gone.mp4")
    with pytest.raises(UsageError, match="both given"):
        media.open(tmp_path / "gone.mp4", frames=1, fps=1.0)
    with pytest.raises(UsageError, match="expected a name that ends with"):
        media.write(tmp_path / "x.avi", noise(1), 4.0)
