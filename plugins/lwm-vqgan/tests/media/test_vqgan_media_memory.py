"""A long video is encoded in the memory that a short one takes. Every frame of it is, in one group of pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

RATE = 5  # frames a second of the video

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")


def moving(count: int) -> Iterator[NDArray[np.uint8]]:
    """A bright square on its way over a gradient."""
    ground = np.repeat(np.linspace(0, 200, 64, dtype=np.uint8)[None, :, None].repeat(64, 0), 3, 2)
    for number in range(count):
        frame = ground.copy()
        top, left = (number // 7) % 56, number % 56
        frame[top : top + 8, left : left + 8] = (255, number % 256, 0)
        yield frame


def measured(minutes: int, tmp_path: Path, video: Any, lwm: Any) -> dict[str, Any]:
    """Encode so many minutes in a process of its own; the frames, the seconds, and the memory at each minute."""
    path = video(tmp_path / "long.mp4", moving(60 * RATE * minutes), rate=RATE, gop=10**6, preset="ultrafast")
    script = Path(__file__).with_name("media_memory.py")
    done = subprocess.run(
        [sys.executable, str(script), str(path), str(tmp_path / "out"), str(RATE)], env=lwm.env, capture_output=True,
        text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["frames"] == 60 * RATE * minutes and len(found["minutes"]) == minutes
    return found


def check_flat(found: dict[str, Any], first: int) -> None:
    """From minute ``first`` to the end memory stays within a tenth of what it was there."""
    memory = np.array(found["minutes"][first - 1 :]) / 2**20
    rate = found["frames"] / found["seconds"]
    print(f"{found['frames']} frames, {rate:.0f} frames/s; MiB at minute {first}: {memory[0]:.1f}, then "
          f"{memory.min():.1f} to {memory.max():.1f}")  # fmt: skip
    assert memory.max() <= 1.1 * memory[0] and memory.min() >= 0.9 * memory[0]


def test_ten_minutes_take_the_memory_of_one(tmp_path: Path, video: Any, lwm: Any) -> None:
    check_flat(measured(10, tmp_path, video, lwm), first=1)


@pytest.mark.slow
def test_an_hour_takes_the_memory_of_five_minutes(tmp_path: Path, video: Any, lwm: Any) -> None:
    check_flat(measured(60, tmp_path, video, lwm), first=5)
