"""The whole system with the JAX trainer as several real processes, as a launcher starts them."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lwm_jax_ring")

RECIPE = """
name = "extend"
seed = 5
model = { preset = "debug", hidden_size = 32, intermediate_size = 64, num_layers = 1 }
tokenizer = { name = "bytes" }
trainer = { name = "jax", join_timeout = 60 }
attention = { name = "jax-ring", layout = "zigzag" }
evals = []

[data]
name = "mix"
sources.text = { kind = "text", corpus = "kjv" }
sources.needle = { kind = "needle", haystack = "text" }
weights = { text = 1.0 }

[context]
name = "progressive"
from = 128
lengths = [256, 512]
theta = [20_000.0, 80_000.0]
tokens = [6_144, 6_144]
batch_tokens = 1024
lr = 1e-3
mesh = ["1,1,1,-1", "1,-1,1,2"]
mix = [{ text = 1.0 }, { text = 0.5, needle = 0.5 }]

[run]
checkpoint_every = 2
"""
"""The first stage's ring goes through all processes, which feed the same rows; in the second each feeds its own."""

STEPS = 12

Rows = Callable[[Path], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where JAX keeps what it has compiled, since every process of these tests compiles the same few programs."""
    return str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture
def everything(lwm: Any, tmp_path: Path, compiled: str) -> Any:
    """The command with every installed plugin, and the recipe beside it."""
    lwm.env = {key: value for key, value in os.environ.items() if not key.startswith("LWM_")}
    lwm.env |= {
        "JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1", "JAX_COMPILATION_CACHE_DIR": compiled,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    (tmp_path / "extend.toml").write_text(RECIPE)
    return lwm


def start(lwm: Any, world: int, *words: str, **env: str) -> list[subprocess.Popen[str]]:
    """``world`` processes of the command, which stand for four devices together, told their places as torchrun does."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    return [
        lwm.start(
            *words, **{
                "RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                "JAX_NUM_CPU_DEVICES": str(4 // world), **env,
            }
        )
        for rank in range(world)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen[str]], seconds: float = 200) -> list[tuple[str, str]]:
    """What each has said, once all have ended."""
    try:
        return [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()


def run(lwm: Any, world: int, *words: str) -> list[tuple[str, str]]:
    processes = start(lwm, world, *words)
    said = finish(processes)
    assert [process.returncode for process in processes] == [0] * world, said
    return said


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows]


@pytest.mark.slow
def test_a_process_killed_at_random_ends_the_others_and_the_run_goes_on_bit_for_bit(
    everything: Any, tmp_path: Path, exact_rows: Rows
) -> None:
    """The survivor names the lost rank within a minute; what is resumed ends as if nothing had happened, and in one
    process of four devices with the same data and losses."""
    said = run(everything, 2, "run", "extend.toml", "--out", "whole", "--json")
    assert json.loads(said[0][0])["steps"] == STEPS, "nothing else may write to the command's output"
    assert not said[1][0] + said[1][1], "rank 0 alone speaks"
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["processes"] == 2
    chance = random.Random(4)
    out = tmp_path / "killed"
    metrics = out / "metrics.jsonl"
    for victim in (1, 0):
        words = ("resume", str(out)) if (out / "run.json").exists() else ("run", "extend.toml", "--out", str(out))
        processes = start(everything, 2, *words)
        aim = lines(metrics) + chance.randrange(2, 4)
        while processes[victim].poll() is None and lines(metrics) < aim:
            time.sleep(0.002)
        processes[victim].kill()
        killed = time.monotonic()
        told = finish(processes, 60)[1 - victim][1]
        assert time.monotonic() - killed < 60
        assert processes[1 - victim].returncode == 1, told
        assert f"rank {victim} has died" in told.splitlines()[-1], told
        assert "Traceback" not in told and "Check failure" not in told, told
    assert lines(metrics) < STEPS
    alone = shutil.copytree(out, tmp_path / "alone")
    run(everything, 2, "resume", str(out))
    whole = exact_rows(tmp_path / "whole")
    assert exact_rows(out) == whole
    run(everything, 1, "resume", str(alone))
    assert [row["tokens"] for row in exact_rows(alone)] == [row["tokens"] for row in whole]
    assert losses(exact_rows(alone)) == pytest.approx(losses(whole), rel=1e-4)
    model = "model/model.safetensors"
    assert (out / model).read_bytes() == (tmp_path / "whole" / model).read_bytes()


@pytest.mark.slow
def test_a_run_goes_on_in_another_number_of_processes_with_the_same_data(
    everything: Any, tmp_path: Path, exact_rows: Rows
) -> None:
    """Stopped in 2 x 2 devices and resumed in 1 x 4, and the other way round: the same losses, to rounding."""
    (tmp_path / "extend.toml").write_text(RECIPE + '[samples]\nprompts = ["And God said"]\nmax_new_tokens = 3\n')
    run(everything, 1, "run", "extend.toml", "--out", "alone")
    alone = exact_rows(tmp_path / "alone")
    for before, after in ((2, 1), (1, 2)):
        out = tmp_path / f"from-{before}"
        processes = start(everything, before, "run", "extend.toml", "--out", str(out))
        while lines(out / "metrics.jsonl") < 3:
            assert processes[0].poll() is None, finish(processes)
            time.sleep(0.002)
        processes[-1].terminate()  # any rank's signal stops all
        said = finish(processes)
        assert [process.returncode for process in processes] == [143] * before, said
        assert "continue with: lwm resume" in said[0][1]
        assert len(exact_rows(out)) < STEPS
        run(everything, after, "resume", str(out))
        rows = exact_rows(out)
        assert [row["tokens"] for row in rows] == [row["tokens"] for row in alone]
        assert losses(rows) == pytest.approx(losses(alone), rel=1e-4)
        said_by = [json.loads((one / "samples" / "text.json").read_text()) for one in (out, tmp_path / "alone")]
        assert [sample["text"] for sample in said_by[0]] == [sample["text"] for sample in said_by[1]] != []


WRONG = {
    '-s context.mesh=["1,1,1,3","1,-1,1,2"]': "needs 3 devices, but 4 are here",
    "-s attention.strategy=rings": "attention.strategy",
    "MASTER_PORT=": "MASTER_PORT not set, but WORLD_SIZE is 2",
    "JAX_COORDINATOR_ADDRESS=nowhere": "'nowhere'; expected HOST:PORT",
    "WORLD_SIZE=3": "not all processes came to 127.0.0.1:",
}


@pytest.mark.parametrize("change", WRONG)
def test_wrong_use_is_one_clear_error(change: str, everything: Any, tmp_path: Path) -> None:
    words = change.split(" ", 1) if change.startswith("-s") else ["-s", "trainer.join_timeout=5"]
    env = {} if change.startswith("-s") else dict([change.split("=")])
    processes = start(everything, 2, "run", "extend.toml", "--out", "out", *words, **env)
    said = finish(processes, 100)
    assert all(process.returncode in (1, 2) for process in processes), said
    told = said[0][1].splitlines()
    assert len(told) == 1 and WRONG[change] in told[0], told
    assert "Traceback" not in said[1][1]
    assert not (tmp_path / "out" / "run.json").exists()
