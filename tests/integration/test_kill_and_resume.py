"""The adversarial heart: runs are killed at random moments and must end as if nothing had happened."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Write = Callable[..., Path]
Rows = Callable[[Path], list[dict[str, Any]]]

SLOW = "step_seconds = 0.01, save_seconds = 0.02"
EVALS = '{ name = "tally", sample_seconds = 0.02 }'


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


class Moved:
    """Whether a file has grown, or was cut, by so many lines since."""

    def __init__(self, path: Path, by: int) -> None:
        self._path, self._by, self._first = path, by, lines(path)

    def __call__(self) -> bool:
        return abs(lines(self._path) - self._first) >= self._by


def wait_until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> bool:
    """Whether the condition came true before the process ended."""
    while process.poll() is None:
        if condition():
            return True
        time.sleep(0.001)
    return False


def kill_until_done(lwm: Any, path: Path, out: Path, seed: int, most: int) -> int:
    """Start, kill −9 at a random moment, resume, ... until a process ends by itself; returns the number of kills."""
    chance = random.Random(seed)
    kills = 0
    while True:
        words = ("resume", str(out)) if (out / "run.json").exists() else ("run", str(path), "--out", str(out))
        process = lwm.start(*words)
        moved = Moved(out / "metrics.jsonl", chance.randrange(1, 12))
        extra = chance.uniform(0, 0.08)
        if kills < most and wait_until(process, moved):
            time.sleep(extra)
            process.kill()
            kills += 1
            process.communicate()
            continue
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        return kills


def same_in_the_end(whole: Path, killed: Path, exact_rows: Rows) -> None:
    assert exact_rows(killed) == exact_rows(whole)
    for name in ("model/model.safetensors", "model/config.json", "evals/tally.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    assert json.loads((killed / "run.json").read_text())["status"] == "done"
    steps = [path.name for path in sorted((killed / "checkpoints").iterdir())]
    assert steps == [path.name for path in sorted((whole / "checkpoints").iterdir())]


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_runs_end_bit_for_bit_as_an_undisturbed_one(lwm: Any, small: Write, exact_rows: Rows, seed: int) -> None:
    path = small(trainer=SLOW, evals=EVALS)
    assert lwm("run", str(path), "--out", "whole").returncode == 0
    assert kill_until_done(lwm, path, lwm.cwd / "killed", seed, most=4) >= 2
    same_in_the_end(lwm.cwd / "whole", lwm.cwd / "killed", exact_rows)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [10, 15, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(20, 30))])
def test_many_kills_over_a_longer_run(lwm: Any, small: Write, exact_rows: Rows, seed: int) -> None:
    path = small(trainer=SLOW, evals=EVALS, tokens=2560, every=3)
    assert lwm("run", str(path), "--out", "whole").returncode == 0
    assert kill_until_done(lwm, path, lwm.cwd / "killed", seed, most=12) >= 5
    same_in_the_end(lwm.cwd / "whole", lwm.cwd / "killed", exact_rows)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(
    lwm: Any, small: Write, exact_rows: Rows, number: signal.Signals, code: int
) -> None:
    path = small(trainer="step_seconds = 0.05, save_seconds = 0.2", every=1000)
    assert lwm("run", str(path), "--out", "whole").returncode == 0
    process = lwm.start("run", str(path), "--out", "r")
    assert wait_until(process, lambda: lines(lwm.cwd / "r" / "metrics.jsonl") >= 3)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in errors
    assert errors.splitlines()[-1] == "stopped; continue with: lwm resume r"
    assert json.loads((lwm.cwd / "r" / "run.json").read_text())["status"] == "stopped"
    done = lines(lwm.cwd / "r" / "metrics.jsonl")
    assert done < 15 and (lwm.cwd / "r" / "checkpoints" / f"step_{done}" / "manifest.json").exists()
    resumed = lwm("resume", "r")
    assert resumed.returncode == 0 and f"from step_{done}" in resumed.stderr
    assert exact_rows(lwm.cwd / "r") == exact_rows(lwm.cwd / "whole")


def test_a_signal_during_an_evaluation_keeps_its_finished_samples(lwm: Any, small: Write) -> None:
    path = small(evals='{ name = "tally", sample_seconds = 0.1, samples = 20 }')
    process = lwm.start("run", str(path), "--out", "r")
    journal = lwm.cwd / "r" / "evals" / "tally.jsonl"
    assert wait_until(process, lambda: lines(journal) >= 3)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    kept = journal.read_text()
    assert 3 <= kept.count("\n") < 20
    assert lwm("resume", "r").returncode == 0
    assert journal.read_text().startswith(kept) and lines(journal) == 40


def test_a_second_ctrl_c_stops_at_once(lwm: Any, small: Write) -> None:
    path = small(trainer="step_seconds = 30")
    process = lwm.start("run", str(path), "--out", "r")
    assert wait_until(process, lambda: (lwm.cwd / "r" / "run.json").exists())
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None, "the first asks for an end after the step"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode != 0 and time.monotonic() - began < 5


def test_a_second_process_is_kept_out(lwm: Any, small: Write) -> None:
    path = small(trainer="step_seconds = 0.2")
    process = lwm.start("run", str(path), "--out", "r")
    assert wait_until(process, lambda: lines(lwm.cwd / "r" / "metrics.jsonl") >= 1)
    done = lwm("resume", "r")
    process.kill()
    process.communicate()
    assert done.returncode == 2 and "r is in use: another lwm process is running it" in done.stderr
