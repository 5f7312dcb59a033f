"""One run over several real processes: the same as alone, one voice, and nobody left waiting whatever goes wrong."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lwm_core import checkpoint
from lwm_core.checkpoint import step_folders, verify

Write = Callable[..., Path]
Rows = Callable[[Path], list[dict[str, Any]]]
Whole = Callable[..., Path]

EVALS = '{ name = "tally" }'
SLOW = "step_seconds = 0.02, save_seconds = 0.02"


def state_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in (folder / checkpoint.TRAINER).glob("*.npz"):
        with np.load(path) as part:
            found |= dict(part)
    return found


def same_in_the_end(whole: Path, run: Path, exact_rows: Rows) -> None:
    assert exact_rows(run) == exact_rows(whole)
    for name in ("model/model.safetensors", "model/config.json", "evals/tally.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    folders = step_folders(run / "checkpoints")
    assert [one.name for one in folders] == [one.name for one in step_folders(whole / "checkpoints")]
    for one in folders:
        assert verify(one) is None
        state, expected = state_of(one), state_of(whole / "checkpoints" / one.name)
        assert state.keys() == expected.keys()
        assert all((state[key] == expected[key]).all() for key in state)


def told(ended: list[Any]) -> list[str]:
    """Every line of an error that any process has printed; none may be a traceback or a guard's."""
    text = "".join(one.err for one in ended)
    assert "Traceback" not in text and " wrote " not in text, text
    return [line for line in text.splitlines() if "error: " in line]


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_until(processes: list[Any], condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert all(one.poll() is None for one in processes), [one.communicate() for one in processes]
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_do_as_one_and_rank_0_alone_writes_and_speaks(
    together_run: Any, small: Write, whole: Whole, exact_rows: Rows, world: int
) -> None:
    """Two rows a step: 2 processes feed one each; 3 feed the same two."""
    path = small(evals=EVALS, trainer="save_seconds = 0.02")
    alone, run = whole(path), together_run.cwd / "r"
    ended = together_run(world, "run", str(path), "--out", "r", STANDIN_REPORT="1")
    assert [one.code for one in ended] == [0] * world, ended
    assert all((one.out, one.err) == ("", "") for one in ended[1:])
    assert ended[0].out.endswith("report: r/report.html\n") and "tally after long" in ended[0].err
    same_in_the_end(alone, run, exact_rows)
    files = [one.name for one in (run / "checkpoints" / "step_15" / "trainer").iterdir()]
    assert sorted(files) == [f"state_{rank}.npz" for rank in range(world)]
    assert (run / "events.jsonl").read_bytes() == (alone / "events.jsonl").read_bytes()
    texts = [json.loads((one / "samples" / "text.json").read_text())[0]["text"] for one in (run, alone)]
    assert texts[0] == texts[1]
    described = json.loads((run / "run.json").read_text())
    assert described["processes"] == world and described["status"] == "done"
    again = together_run(world, "resume", "r")
    assert [one.code for one in again] == [0] * world and "was finished before" in again[0].out
    assert all((one.out, one.err) == ("", "") for one in again[1:])


def test_killed_at_random_and_resumed_on_other_numbers_of_processes(
    together_run: Any, small: Write, whole: Whole, exact_rows: Rows
) -> None:
    path = small(trainer=SLOW, evals=EVALS)
    alone, run = whole(path), together_run.cwd / "r"
    chance = random.Random(5)
    for world in (2, 3, 2):
        words = ("resume", "r") if (run / "run.json").exists() else ("run", str(path), "--out", "r")
        processes = together_run.start(world, *words)
        before = lines(run / "metrics.jsonl")
        wait_until(processes, lambda before=before: abs(lines(run / "metrics.jsonl") - before) >= 3)  # type: ignore[misc]
        time.sleep(chance.uniform(0, 0.05))
        for one in chance.sample(processes, world):
            one.kill()
        together_run.ended(processes)
    for ended in (together_run(1, "resume", "r"), together_run(2, "resume", "r")):
        assert all(one.code == 0 for one in ended), ended
    assert json.loads((run / "run.json").read_text())["processes"] == 1
    same_in_the_end(alone, run, exact_rows)


def test_one_process_that_is_killed_ends_the_others(together_run: Any, small: Write) -> None:
    processes = together_run.start(3, "run", str(small(trainer="step_seconds = 0.05", tokens=64000)), "--out", "r")
    wait_until(processes, lambda: lines(together_run.cwd / "r" / "metrics.jsonl") >= 2)
    processes[2].kill()
    ended = together_run.ended(processes, timeout=20)
    assert [one.code for one in ended] == [1, 1, -signal.SIGKILL]
    assert json.loads((together_run.cwd / "r" / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_stops_all_after_the_same_step(
    together_run: Any, small: Write, whole: Whole, exact_rows: Rows, number: signal.Signals
) -> None:
    path = small(trainer="step_seconds = 0.1, save_seconds = 0.1", evals=EVALS, every=1000)
    alone, run = whole(path), together_run.cwd / "r"
    processes = together_run.start(2, "run", str(path), "--out", "r")
    wait_until(processes, lambda: lines(run / "metrics.jsonl") >= 3)
    processes[1].send_signal(number)
    ended = together_run.ended(processes)
    assert [one.code for one in ended] == [128 + number] * 2
    assert ended[0].err.splitlines()[-1] == "stopped; continue with: lwm resume r"
    assert ended[0].err.count("stopping after this step") == 1 and ended[1].err == ""
    assert json.loads((run / "run.json").read_text())["status"] == "stopped"
    done = lines(run / "metrics.jsonl")
    assert 3 <= done < 15 and verify(run / "checkpoints" / f"step_{done}") is None
    assert [one.code for one in together_run(2, "resume", "r")] == [0, 0]
    assert exact_rows(run) == exact_rows(alone)
    assert (run / "model/model.safetensors").read_bytes() == (alone / "model/model.safetensors").read_bytes()


def test_a_signal_to_one_process_during_an_evaluation(together_run: Any, small: Write) -> None:
    path = small(evals='{ name = "tally", sample_seconds = 0.1, samples = 20 }')
    processes = together_run.start(2, "run", str(path), "--out", "r")
    journal = together_run.cwd / "r" / "evals" / "tally.jsonl"
    wait_until(processes, lambda: lines(journal) >= 3)
    processes[1].send_signal(signal.SIGTERM)
    ended = together_run.ended(processes)
    assert [one.code for one in ended] == [143, 143] and ended[1].err == ""
    assert 3 <= lines(journal) < 20
    assert json.loads((together_run.cwd / "r" / "run.json").read_text())["status"] == "stopped"


FULL = "raise OSError(28, 'No space left on device')"

FAILURES = {
    "the trainer's save on rank 0": ("", ["trainer.full_at=2"], 0, "the disk is full; step_4 before it is untouched"),
    "the trainer's save on rank 1": (
        "", ["trainer.full_at=2", "trainer.full_rank=1"], 1, "the disk is full; step_4 before it is untouched",
    ),
    "the commit": (
        f"""
from lwm_core import checkpoint
commit = checkpoint.commit
def full(folder, state):
    if state.step == 8: {FULL}
    commit(folder, state)
checkpoint.commit = full
""", [], 0, "step_8: the disk is full; step_4 before it is untouched",
    ),
    "the metrics": (
        f"""
from lwm_core.metrics import MetricsLog
write = MetricsLog.write
def full(self, row):
    if row["step"] == 6: {FULL}
    write(self, row)
MetricsLog.write = full
""", [], 0, "the disk is full; free space",
    ),
    "the model": (
        f"""
import lwm_core.run.evaluating as evaluating
def full(folder, model, rope, seq_len, parameters, dtype, **rest):
    next(iter(parameters))
    {FULL}
evaluating.write_model_folder = full
""", [], 0, "the disk is full; free space",
    ),
    "a suite": (
        """
from lwm_core.errors import DataError
import lwm_standin.tally as tally
def run(self, context):
    context.scorer.log_likelihood([1, 2, 3])
    next(iter(context.generator.stream([1], __import__("lwm_core.protocols").protocols.SamplingSpec())))
    raise DataError("no questions are left")
tally.Tally.run = run
""", [], 0, "no questions are left",
    ),
    "the rows of rank 1": (
        """
from lwm_core.errors import DataError
from lwm_core.builtins import text_rows
if rank == 1:
    make = text_rows.TextFileFeed.batch
    def batch(self, step):
        if step == 5: raise DataError("shard 7 is unreadable")
        return make(self, step)
    text_rows.TextFileFeed.batch = batch
""", [], 1, "shard 7 is unreadable",
    ),
    "the loss": ("", ["trainer.nan_at=6"], 0, "loss is nan at step 6 (step 6 of stage 'short'); the last good"),
}  # fmt: skip


@pytest.mark.parametrize("what", FAILURES)
def test_what_fails_on_one_process_ends_all_with_one_line(together_run: Any, small: Write, what: str) -> None:
    prelude, overrides, rank, message = FAILURES[what]
    words = [word for one in overrides for word in ("-s", one)]
    ended = together_run(2, "run", str(small(evals=EVALS)), "--out", "r", *words, prelude=prelude)
    [line] = told(ended)
    assert line.startswith(f"rank {rank}: error: ") and message in line, line
    assert line in ended[rank].err and [one.code for one in ended] == [1, 1]
    assert json.loads((together_run.cwd / "r" / "run.json").read_text())["status"] == "failed"
    assert all(verify(one) is None for one in step_folders(together_run.cwd / "r" / "checkpoints"))


@pytest.mark.parametrize(
    ("overrides", "prelude", "code", "message"),
    [
        (["stages.1.mesh=2,1,1,1"], "", 2, "needs 2 devices, but 1 are here"),
        (["data.path=gone.txt"], "", 1, "gone.txt: no such file"),
        (
            [], "import lwm_standin.processes as p; p.join = lambda: p.ALONE", 2,
            "runs as rank 0 of 1, but this process was launched as rank 0 of 2",
        ),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_once_and_nothing_is_written(
    together_run: Any, small: Write, overrides: list[str], prelude: str, code: int, message: str
) -> None:
    words = [word for one in overrides for word in ("-s", one)]
    ended = together_run(2, "run", str(small()), "--out", "r", *words, prelude=prelude)
    found = told(ended)
    assert len(found) == 1 and found[0].startswith("rank 0: error: ") and message in found[0], found
    assert [one.code for one in ended] == [code] * 2 and not (together_run.cwd / "r").exists()


def test_a_folder_in_use_is_refused_once_and_left_as_it_is(together_run: Any, small: Write) -> None:
    folder = together_run.cwd / "r"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    ended = together_run(2, "run", str(small()), "--out", "r")
    assert [one.code for one in ended] == [2, 2] and len(told(ended)) == 1 and "is not empty" in ended[0].err
    assert [one.name for one in folder.iterdir()] == ["thesis.tex"]
    path = small(trainer="step_seconds = 0.05", tokens=64000)
    processes = together_run.start(2, "run", str(path), "--out", "s")
    wait_until(processes, lambda: lines(together_run.cwd / "s" / "metrics.jsonl") >= 1)
    ended = together_run(2, "resume", "s")
    assert [one.code for one in ended] == [2, 2] and len(told(ended)) == 1 and "s is in use" in ended[0].err


def test_what_was_trained_is_evaluated_and_written_with_on_all(
    together_run: Any, lwm: Any, small: Write, whole: Whole
) -> None:
    whole(small(evals=EVALS))
    asked = ("generate", "whole", "text", "--prompt", "And God", "--max-new-tokens", "12", "--json")
    alone = json.loads(lwm(*asked).stdout)
    shorter = ("--stop", alone["text"][4])
    for more in ((), shorter):
        one, expected = together_run(3, *asked, *more), json.loads(lwm(*asked, *more).stdout)
        assert [each.code for each in one] == [0, 0, 0] and all((o.out, o.err) == ("", "") for o in one[1:])
        given = json.loads(one[0].out)
        assert (given["text"], given["tokens"], given["source"]) == (
            expected["text"], expected["tokens"], expected["source"],
        )  # fmt: skip
    assert given["tokens"] < alone["tokens"]
    (together_run.cwd / "whole" / "evals" / "tally.jsonl").unlink()
    ended = together_run(2, "eval", "whole", "--json")
    assert [each.code for each in ended] == [0, 0], ended
    told_alone = json.loads(lwm("eval", "whole", "--json").stdout)
    assert json.loads(ended[0].out) == told_alone and (ended[1].out, ended[1].err) == ("", "")
    ended = together_run(2, "eval", "whole", "--suite", "needle")
    assert [each.code for each in ended] == [2, 2] and len(told(ended)) == 1


def test_a_launch_that_makes_no_sense_is_told(lwm: Any, small: Write) -> None:
    done = lwm("run", str(small()), "--out", "r", RANK="4", WORLD_SIZE="4")
    assert done.returncode == 2 and "RANK=4 and WORLD_SIZE=4 are set, which is no rank of a world" in done.stderr
    assert lwm("run", str(small()), "--out", "r", RANK="3").returncode == 0, "a rank without a world is somebody else's"
