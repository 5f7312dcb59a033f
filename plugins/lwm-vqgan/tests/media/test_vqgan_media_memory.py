"""A long video is encoded in the memory that a short one takes. It is one group of pictures."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lwm_core.shards import open_shards

RATE = 5  # frames a second of the video

PAGE = 4096
STATM = "/proc/{}/statm"

pytestmark = pytest.mark.skipif(not Path(STATM.format("self")).exists(), reason="memory is read from /proc")


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


def check_flat(minutes: list[int], rate: float) -> None:
    """Memory stays within a tenth of what it was at first."""
    memory = np.array(minutes) / 2**20
    print(f"{rate:.0f} frames/s; MiB at first: {memory[0]:.1f}, then {memory.min():.1f} to {memory.max():.1f}")
    assert memory.max() <= 1.1 * memory[0] and memory.min() >= 0.9 * memory[0]


def test_ten_minutes_take_the_memory_of_one(tmp_path: Path, video: Any, lwm: Any) -> None:
    found = measured(10, tmp_path, video, lwm)
    check_flat(found["minutes"], found["frames"] / found["seconds"])


@pytest.mark.slow
def test_an_hour_takes_the_memory_of_five_minutes(tmp_path: Path, video: Any, lwm: Any) -> None:
    found = measured(60, tmp_path, video, lwm)
    check_flat(found["minutes"][4:], found["frames"] / found["seconds"])


@pytest.mark.long
def test_an_hour_by_the_shipped_vqgan_goes_on_after_a_kill(tmp_path: Path, video: Any, lwm: Any, files_in: Any) -> None:
    """A frame a second of an hour, by the command; then once more, killed with half of it done and started again."""
    path = video(tmp_path / "hour.mp4", moving(3600 * RATE), rate=RATE, gop=10**6, preset="ultrafast")
    words = ("encode", path, "--fps", "1", "--quiet", "--shard-frames", "128")
    began, process = time.perf_counter(), lwm.start(*words, "whole")
    most: dict[int, int] = {}  # by minutes of the video that are safe, the most memory until more of them were
    while process.poll() is None:
        minute = lwm.committed("whole") // 60
        pages = Path(STATM.format(process.pid)).read_text().split()
        most[minute] = max(most.get(minute, 0), int(pages[1]) * PAGE if len(pages) > 1 else 0)
        time.sleep(0.05)
    seconds = time.perf_counter() - began
    assert process.returncode == 0, process.communicate()[1]
    from_five = [taken for minute, taken in most.items() if 5 <= minute < 60]  # at 60 it closes
    assert len(from_five) > 10
    check_flat(from_five, 3600 / seconds)

    process = lwm.start(*words, "killed")
    while lwm.committed("killed") < 1800:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate()
    done = lwm(*words, "killed")
    assert done.returncode == 0, done.stderr
    assert files_in(tmp_path / "killed") == files_in(tmp_path / "whole")
    assert open_shards(tmp_path / "killed", verify=True).videos[0].frames == 3600
