"""``lwm encode`` in processes of its own, killed and stopped at any moment: the codes end as if nothing had been."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lwm_core.shards import open_shards

WORDS = ("--encoder", "mosaic", "-s", "frame_seconds=0.003", "--batch", "4", "--shard-frames", "12", "--quiet")


@pytest.fixture
def folder(tmp_path: Path, video: Any, frames_of: Any) -> Path:
    """Three videos, of which one holds one frame."""
    folder = tmp_path / "in"
    folder.mkdir()
    video(folder / "a.mp4", frames_of(90, seed=1))
    video(folder / "b.mkv", frames_of(1, seed=2), codec="ffv1", pixels="bgr0")
    video(folder / "c.ts", frames_of(70, seed=3))
    return folder


def wait_until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> bool:
    """Whether the condition came true before the process ended."""
    while process.poll() is None:
        if condition():
            return True
        time.sleep(0.001)
    return False


def kill_until_done(lwm: Any, folder: Path, out: str, seed: int, most: int) -> int:
    """Start, kill −9 at a random moment, start again, ... until a process ends by itself; returns how many kills."""
    chance = random.Random(seed)
    kills = 0
    while True:
        process = lwm.start("encode", folder, out, *WORDS)
        due = lwm.committed(out) + chance.randrange(0, 40)
        if kills < most and wait_until(process, lambda due=due: lwm.committed(out) >= due):  # type: ignore[misc]
            time.sleep(chance.uniform(0, 0.05))
            process.kill()
            kills += 1
            process.communicate()
            continue
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        return kills


def check_kills(lwm: Any, folder: Path, files_in: Any, seed: int, most: int, least: int) -> None:
    done = lwm("encode", folder, "whole", *WORDS)
    assert done.returncode == 0, done.stderr
    assert kill_until_done(lwm, folder, "killed", seed, most) >= least
    assert files_in(lwm.cwd / "killed") == files_in(lwm.cwd / "whole")
    shards = open_shards(lwm.cwd / "killed", verify=True)
    assert [(video.name, video.frames) for video in shards.videos] == [("a.mp4", 90), ("b.mkv", 1), ("c.ts", 70)]


def test_killed_encodings_end_byte_for_byte_as_an_undisturbed_one(lwm: Any, folder: Path, files_in: Any) -> None:
    check_kills(lwm, folder, files_in, seed=1, most=3, least=2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [10, 11, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(12, 20))])
def test_many_kills(lwm: Any, folder: Path, files_in: Any, seed: int) -> None:
    check_kills(lwm, folder, files_in, seed, most=12, least=3)


def test_signals_commit_and_say_how_to_go_on(
    lwm: Any, tmp_path: Path, video: Any, frames_of: Any, files_in: Any
) -> None:
    """Far from the next shard: what was encoded until then is kept, and the same command ends it."""
    path = video(tmp_path / "a.mp4", frames_of(60))
    words = (*WORDS[:2], "-s", "frame_seconds=0.03", "--batch", "4")
    assert lwm("encode", path, "whole", *words).returncode == 0
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        out = tmp_path / f"stopped-{code}"
        process = lwm.start("encode", path, out, *words)
        assert wait_until(process, lambda out=out: (out / "manifest.json").exists())  # type: ignore[misc]
        time.sleep(0.2)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code and "Traceback" not in errors
        assert errors.splitlines()[-1] == "stopped; the same command goes on from here"
        assert 0 < lwm.committed(out) < 60
        assert lwm("encode", path, out, *words).returncode == 0
        assert files_in(out) == files_in(tmp_path / "whole")


def test_a_second_process_is_kept_out(lwm: Any, folder: Path) -> None:
    process = lwm.start("encode", folder, "out", *WORDS[:2], "-s", "frame_seconds=0.1")
    assert wait_until(process, lambda: (lwm.cwd / "out" / "manifest.json").exists())
    done = lwm("encode", folder, "out", *WORDS)
    process.kill()
    process.communicate()
    assert done.returncode == 2 and "out is in use" in done.stderr
