"""The whole system with the Torch trainer as several real processes, as a launcher starts them."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("lwm_torch_ring")

RECIPE = """
name = "extend"
seed = 5
model = { preset = "debug", hidden_size = 32, intermediate_size = 64, num_layers = 2 }
tokenizer = { name = "bytes" }
trainer = { name = "torch", device = "cpu" }
attention = { name = "torch-ring", layout = "zigzag" }
evals = [{ name = "needle", samples = 2, samples_longest = 2, lengths = [512], max_new_tokens = 6 }]

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
tokens = [12_288, 12_288]
batch_tokens = 1024
lr = 1e-3
mesh = ["1,1,1,-1", "1,-1,1,1"]
mix = [{ text = 1.0 }, { text = 0.5, needle = 0.5 }]

[samples]
prompts = ["And God said"]
max_new_tokens = 4

[run]
checkpoint_every = 5
"""

Rows = Callable[[Path], list[dict[str, Any]]]


@pytest.fixture
def everything(lwm: Any, tmp_path: Path) -> Any:
    """The command with every installed plugin, and the recipe beside it."""
    lwm.env = {key: value for key, value in os.environ.items() if not key.startswith("LWM_")}
    lwm.env["OMP_NUM_THREADS"] = "1"
    (tmp_path / "extend.toml").write_text(RECIPE)
    return lwm


def start(lwm: Any, world: int, *words: str) -> list[subprocess.Popen[str]]:
    """``world`` processes of the command, told their places as torchrun does."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    return [
        lwm.start(
            *words, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
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


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows]


@pytest.mark.slow
def test_a_rank_killed_at_random_ends_the_others_and_the_run_goes_on_bit_for_bit(
    everything: Any, tmp_path: Path, exact_rows: Rows
) -> None:
    """The survivors name the lost rank within a minute; what is resumed ends as if nothing had happened."""
    said = run(everything, 2, "run", "extend.toml", "--out", "whole")
    assert "done, 24 steps" in said[0][0] and not said[1][0] + said[1][1], "rank 0 alone speaks"
    chance = random.Random(4)
    out = tmp_path / "killed"
    for victim in (1, 0):
        words = ("resume", str(out)) if (out / "run.json").exists() else ("run", "extend.toml", "--out", str(out))
        processes = start(everything, 2, *words)
        metrics = out / "metrics.jsonl"
        aim = (metrics.read_bytes().count(b"\n") if metrics.exists() else 0) + chance.randrange(3, 8)
        while processes[victim].poll() is None:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= aim:
                break
            time.sleep(0.002)
        processes[victim].kill()
        killed = time.monotonic()
        told = finish(processes, 60)[1 - victim][1]
        assert time.monotonic() - killed < 60
        assert processes[1 - victim].returncode == 1, told
        lost = "rank 1 has died" if victim == 1 else "the process that keeps the ranks' store"
        assert lost in told and "Traceback" not in told, told
    run(everything, 2, "resume", str(out))
    assert exact_rows(out) == exact_rows(tmp_path / "whole")
    for name in ("model/model.safetensors", "evals/needle.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.slow
def test_a_run_goes_on_in_another_world_with_the_same_data(everything: Any, tmp_path: Path, exact_rows: Rows) -> None:
    """Stopped by a signal on two ranks, resumed on one: the same losses as alone from the beginning, to rounding."""
    run(everything, 1, "run", "extend.toml", "--out", "alone")
    processes = start(everything, 2, "run", "extend.toml", "--out", "both")
    metrics = tmp_path / "both" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 7:
        assert processes[0].poll() is None, finish(processes)
        time.sleep(0.002)
    processes[1].terminate()  # any rank's signal stops all
    said = finish(processes)
    assert [process.returncode for process in processes] == [143, 143], said
    assert "continue with: lwm resume" in said[0][1]
    assert len(exact_rows(tmp_path / "both")) < 24
    said = run(everything, 2, "export", "both", "early", "--dtype", "float32")
    assert "parameters of both/checkpoints/step_" in said[0][0] and not said[1][0] + said[1][1]
    run(everything, 1, "resume", "both")
    assert losses(exact_rows(tmp_path / "both")) == pytest.approx(losses(exact_rows(tmp_path / "alone")), rel=1e-4)
    assert (tmp_path / "early" / "model.safetensors").stat().st_size > 10_000
    text = everything("generate", "both", "text", "--prompt", "And God", "--max-new-tokens", "4", "--json")
    assert json.loads(text.stdout)["tokens"] >= 1, text.stderr


WRONG = {
    (2, "-s context.mesh=1,1,1,3"): "needs 3 devices, but 2 are here",
    (3, ""): "do not divide",
    (1, "-s context.mesh=1,1,1,4"): "a process is started for each device: torchrun --nproc-per-node",
    (1, "-s attention.strategy=rings"): "attention.strategy",
    (1, "-s attention.name=jax-ring"): "jax",
}


@pytest.mark.parametrize(("world", "override"), WRONG)
def test_wrong_use_is_one_clear_error(world: int, override: str, everything: Any, tmp_path: Path) -> None:
    words = override.split(" ", 1) if override else []
    processes = start(everything, world, "run", "extend.toml", "--out", "out", *words)
    said = finish(processes, 100)
    assert all(process.returncode in (1, 2) for process in processes), said
    assert WRONG[world, override] in said[0][1], said[0][1]
    assert "Traceback" not in "".join(errors for _, errors in said)
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.slow
def test_torchrun_starts_it(everything: Any, tmp_path: Path) -> None:
    """The launcher itself, with the command as the how-to has it."""
    (tmp_path / "lwm").write_text(f"#!{sys.executable}\nimport sys\nfrom lwm_core.cli import main\nsys.exit(main())\n")
    (tmp_path / "lwm").chmod(0o755)
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python", str(tmp_path / "lwm"), "run",
             "extend.toml", "--out", "out", "-s", "context.tokens=[2048,2048]", "-s", "evals=[]", "--json"]  # fmt: skip
    result = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=everything.env, capture_output=True, text=True, timeout=200,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["steps"] == 4
    assert json.loads((tmp_path / "out" / "run.json").read_text())["processes"] == 2
