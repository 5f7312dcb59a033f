"""Runs of the Torch trainer whose processes are killed: the others end, and what is resumed shows no trace of it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("lwm_torch_ring")

pytestmark = pytest.mark.slow

Rows = Callable[[Path], list[dict[str, Any]]]
Processes = list[subprocess.Popen[str]]


def lines(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def wait_until(processes: Processes, condition: Callable[[], bool]) -> None:
    """Until the condition is true, which must be before any of them has ended."""
    while not condition():
        for process in processes:
            assert process.poll() is None, process.communicate()
        time.sleep(0.001)


def unfinished(run: Path) -> list[Path]:
    """Checkpoints that have no manifest, and so are none."""
    return [path for path in run.glob("checkpoints/step_*") if not (path / "manifest.json").exists()]


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows]


def at_random(chance: random.Random, run: Path, took: float) -> Callable[[Processes], None]:
    """Waits for the first step, and then for some part of the time that they all take."""
    before, delay = lines(run), chance.uniform(0, took / 3)

    def wait(processes: Processes) -> None:
        wait_until(processes, lambda: lines(run) != before)
        ends = time.monotonic() + delay
        wait_until(processes, lambda: time.monotonic() >= ends)

    return wait


@pytest.mark.parametrize(("world", "seed"), [(4, 4)])
def test_killed_at_random_and_within_a_save_it_ends_bit_for_bit(
    world: int, seed: int, ranks: Any, tmp_path: Path, exact_rows: Rows
) -> None:
    """The survivors of a rank name it within a minute; what is resumed on the same mesh ends as an undisturbed run."""
    everyone = set(range(world))
    said = ranks.run(world, "run", "extend.toml", "--out", "whole")
    assert "done, 24 steps" in said[0][0] and not any(map(any, said[1:])), f"rank 0 alone speaks: {said}"
    times = [json.loads(line)["time"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    chance, out = random.Random(seed), tmp_path / "killed"

    def kill(victims: set[int], wait: Callable[[Processes], None]) -> str:
        """What the others have said."""
        words = ("resume", str(out)) if (out / "run.json").exists() else ("run", "extend.toml", "--out", str(out))
        processes = ranks.start(world, *words)
        try:
            wait(processes)
        finally:
            for victim in victims:
                processes[victim].kill()
        killed = time.monotonic()
        said: list[tuple[str, str]] = ranks.finish(processes, 60)
        assert time.monotonic() - killed < 60
        assert all(processes[rank].returncode == 1 for rank in everyone - victims), said
        return "".join(said[rank][1] for rank in everyone - victims)

    def within_a_save(processes: Processes) -> None:
        known = unfinished(out)
        wait_until(processes, lambda: bool(set(unfinished(out)) - set(known)))

    for _ in range(5):  # a save may be through before the signal is
        kill(everyone, within_a_save)
        if unfinished(out):
            break
    assert unfinished(out)
    for victim in (world - 1, 0):
        told = kill({victim}, at_random(chance, out, times[-1] - times[0]))
        # It has died to whoever was in a transfer with it, and is silent to those who wait for others.
        lost = f"rank {victim} has " if victim else "the process that keeps the ranks' store"
        assert lost in told and "Traceback" not in told, told
    ranks.run(world, "resume", str(out))
    assert exact_rows(out) == exact_rows(tmp_path / "whole")
    for name in ("model/model.safetensors", "evals/needle.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not unfinished(out)


def test_a_run_goes_from_world_to_world_with_the_same_data(ranks: Any, tmp_path: Path, exact_rows: Rows) -> None:
    """Four ranks are asked to stop; two go on and are killed; one goes on and is killed; two go on to the end.

    The kills fall in the stage whose rows are shared out. Every row that is fed is the very one of a run that was alone
    and undisturbed, and the losses are its own to rounding.
    """
    quick, run = ("-s", "evals=[]", "-s", "run.checkpoint_every=3"), tmp_path / "moved"
    ranks.run(1, "run", "extend.toml", "--out", "alone", *quick, **ranks.noted("noted-alone"))
    alone, among = ranks.fed("noted-alone")
    assert among == {1} and len(alone) == 12 * 8 + 12 * 4 and len(set(alone.values())) == len(alone)

    processes = ranks.start(4, "run", "extend.toml", "--out", "moved", *quick, **ranks.noted("noted-0"))
    wait_until(processes, lambda: lines(run) >= 7)
    processes[1].terminate()  # any rank's signal stops all
    said = ranks.finish(processes)
    assert [process.returncode for process in processes] == [143] * 4, said
    assert "continue with: lwm resume" in said[0][1] and lines(run) < 24
    said = ranks.run(2, "export", "moved", "early", "--dtype", "float32")
    assert "parameters of moved/checkpoints/step_" in said[0][0] and not said[1][0] + said[1][1]
    assert (tmp_path / "early" / "model.safetensors").stat().st_size > 10_000

    chance = random.Random(6)
    for number, (world, saved) in enumerate([(2, 15), (1, 18)], start=1):
        processes = ranks.start(world, "resume", "moved", **ranks.noted(f"noted-{number}"))
        manifest = run / "checkpoints" / f"step_{saved}" / "manifest.json"
        wait_until(processes, lambda: manifest.exists() and lines(run) >= saved)  # noqa: B023
        time.sleep(chance.uniform(0, 0.01))
        for process in processes:
            assert process.poll() is None
            process.kill()
        ranks.finish(processes)
        assert lines(run) < 24
    ranks.run(2, "resume", "moved", **ranks.noted("noted-3"))
    assert losses(exact_rows(run)) == pytest.approx(losses(exact_rows(tmp_path / "alone")), rel=1e-4)

    moved: dict[Any, str] = {}
    for number, data_ranks in enumerate([{1, 4}, {1, 2}, {1}, {2}]):
        fed, among = ranks.fed(f"noted-{number}")
        assert among <= data_ranks
        assert fed.items() <= alone.items()
        moved |= fed
    assert moved == alone
    assert ranks.fed("noted-3")[1] == {2}, "rows were shared out"
    text = ranks.lwm("generate", "moved", "text", "--prompt", "And God", "--max-new-tokens", "4", "--json")
    assert json.loads(text.stdout)["tokens"] >= 1, text.stderr


@pytest.mark.parametrize("victim", [0, 1])
def test_under_torchrun_a_killed_rank_is_named_by_the_other(victim: int, ranks: Any, tmp_path: Path) -> None:
    """The launcher keeps the store, so that rank 0 too is named; it all ends within a minute."""
    ranks.env |= ranks.noted("noted")
    process = ranks.launch(
        2, "run", "extend.toml", "--out", "out", "-s", "evals=[]", "-s", "context.tokens=[999424,2048]"
    )
    wait_until([process], lambda: lines(tmp_path / "out") >= 3)
    died = ranks.process_of("noted", victim)
    assert died is not None
    os.kill(died, signal.SIGKILL)
    killed = time.monotonic()
    [(_, errors)] = ranks.finish([process], 60)
    assert time.monotonic() - killed < 60 and process.returncode != 0
    named = [line for line in errors.splitlines() if f"rank {victim} has died" in line]
    assert len(named) == 1, errors
