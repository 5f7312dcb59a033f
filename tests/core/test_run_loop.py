"""The run loop, driven by the NumPy stand-ins in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lwm_core import checkpoint
from lwm_core.checkpoint import latest_good, step_folders
from lwm_core.config import load_config
from lwm_core.errors import CheckpointError, ConfigError, DataError, TrainingError, UsageError
from lwm_core.model import ModelConfig
from lwm_core.run import RunFolder, reopen, resume, run
from lwm_core.weights import read_model_folder

Write = Callable[..., Path]
Rows = Callable[[Path], list[dict[str, Any]]]

pytestmark = pytest.mark.usefixtures("standin_here")


class Notes:
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)

    def begin_stage(self, stage: Any, done: int) -> None: ...
    def step(self, row: Any) -> None: ...
    def evaluating(self, what: str, done: int, total: int) -> None: ...
    def close(self) -> None: ...


def events(folder: Path) -> list[list[Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_a_run_leaves_the_folder_that_the_design_describes(tmp_path: Path, small: Write, exact_rows: Rows) -> None:
    out = tmp_path / "r"
    outcome = run(load_config(small(evals='{name = "tally"}', trainer="peak_flops = 1e9")), out, command=["lwm", "run"])
    rows = exact_rows(out)
    assert [row["step"] for row in rows] == list(range(1, 16))
    where = [(row["stage"], row["stage_index"], row["stage_step"]) for row in rows[9:11]]
    assert where == [("short", 0, 10), ("long", 1, 1)]
    tokens = [row["tokens"] for row in rows]
    assert tokens[:10] == [64 * step for step in range(1, 11)], "tokens so far, not those of the step"
    assert tokens[-1] == 10 * 64 + 5 * (tokens[-1] - tokens[-2])
    assert {"loss", "loss_text", "grad_norm", "lr"} <= set(rows[0])
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"] and outcome.loss == rows[-1]["loss"] and outcome.steps == 15
    described = json.loads((out / "run.json").read_text())
    assert set(described) >= {
        "name", "config", "origins", "stages", "start", "model", "plugins", "versions", "choices", "machine", "trainer",
        "command",
    }  # fmt: skip
    assert described["status"] == "done" and described["command"] == ["lwm", "run"]
    assert described["origins"]["stages.0.seq_len"].startswith(str(tmp_path / "small.toml:"))
    assert {"kind": "trainer", "name": "standin", "dist": "lwm-standin", "version": "0.1.0"} in described["plugins"]
    assert {"kind": "hooks", "name": "scribe", "dist": "lwm-standin", "version": "0.1.0"} in described["plugins"]
    assert [path.name for path in step_folders(out / "checkpoints")] == ["step_15", "step_12", "step_10"]
    [sample] = json.loads((out / "samples" / "text.json").read_text())
    assert sample["stage"] == "long" and sample["prompt"] == "And God " and sample["tokens_per_second"] > 0
    stages = [row["stage"] for row in json.loads((out / "evals" / "tally.json").read_text())["rows"]]
    assert stages == ["short"] * 4 + ["long"] * 4
    model = read_model_folder(out / "model")
    assert model.seq_len == 64 and model.rope.theta == 4e4
    values = {key: value for key, value in described["model"].items() if key != "parameter_count"}
    assert model.model == ModelConfig.from_dict(values)
    raw = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(row["mfu"] > 0 and row["tokens_per_second"] > 0 for row in raw)


def test_hooks_hear_everything_in_order(tmp_path: Path, small: Write) -> None:
    run(load_config(small()), tmp_path / "r")
    heard = events(tmp_path / "r")
    assert heard[0] == ["run_start", "small", 2] and heard[-1] == ["run_end", "done"]
    assert [one[1:] for one in heard if one[0] == "stage_change"] == [[None, "short"], ["short", "long"]]
    assert [one[1] for one in heard if one[0] == "step_end"] == list(range(1, 16))
    assert [one[1:] for one in heard if one[0] == "checkpoint"] == [
        [f"step_{n}", True] for n in (4, 8, 10, 12, 15)
    ]  # fmt: skip


def test_a_report_by_a_plugin_is_part_of_the_outcome(
    tmp_path: Path, small: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN_REPORT", "1")
    assert run(load_config(small()), tmp_path / "r").report == tmp_path / "r" / "report.html"
    assert resume(tmp_path / "r").report == tmp_path / "r" / "report.html"


def test_the_base_model_is_evaluated_before_and_trained_from(tmp_path: Path, small: Write, exact_rows: Rows) -> None:
    run(load_config(small()), tmp_path / "first")
    path = small(evals='{name = "tally"}')
    more = load_config(path, [f"init={tmp_path}/first/model"])
    run(more, tmp_path / "second")
    table = json.loads((tmp_path / "second" / "evals" / "tally.json").read_text())["rows"]
    assert list(dict.fromkeys(row["stage"] for row in table)) == ["base", "short", "long"]
    first, second = exact_rows(tmp_path / "first"), exact_rows(tmp_path / "second")
    assert second[0]["loss"] < first[0]["loss"], "it starts where the first run ended"
    run(load_config(path, [f"init={tmp_path}/first/model", "run.eval_base=false"]), tmp_path / "3")
    table = json.loads((tmp_path / "3" / "evals" / "tally.json").read_text())["rows"]
    assert table[0]["stage"] == "short"


def test_a_run_from_a_model_of_its_own_shape_is_resumed_and_reopened(
    tmp_path: Path, small: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, shape = small(), "model.num_layers=3"
    run(load_config(path, [shape]), tmp_path / "first")
    init = f"init={tmp_path}/first/model"
    run(load_config(path, [init, shape]), tmp_path / "said")
    assert reopen(tmp_path / "said").pipeline.model.num_layers == 3
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith("model = ")))
    interrupted(tmp_path / "unsaid", path, monkeypatch, 2, [init])
    resume(tmp_path / "unsaid")
    assert reopen(tmp_path / "unsaid").pipeline.model.num_layers == 3


def test_the_layout_permutes_what_the_trainer_gets_and_nothing_else(
    tmp_path: Path, small: Write, exact_rows: Rows
) -> None:
    """A bigram model sees pairs (token, target) alone: a permuted batch gives its loss up to the order of a sum."""
    run(load_config(small()), tmp_path / "one")
    run(load_config(small(trainer="devices = 4")), tmp_path / "four")
    one, four = exact_rows(tmp_path / "one"), exact_rows(tmp_path / "four")
    assert [row["loss"] for row in one] != [row["loss"] for row in four], "the order of the sum did not change"
    for a, b in zip(one, four, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_a_loss_that_is_not_finite_ends_the_run_and_writes_nothing_over(
    tmp_path: Path, small: Write, exact_rows: Rows
) -> None:
    out = tmp_path / "r"
    with pytest.raises(TrainingError) as caught:
        run(load_config(small(trainer="nan_at = 11, save_seconds = 0.2")), out)
    told = str(caught.value)
    assert "loss is nan at step 11 (step 1 of stage 'long')" in told and "step_10" in told and "\n" not in told
    assert len(exact_rows(out)) == 10
    found = latest_good(out / "checkpoints")
    assert found.path is not None and found.path.name == "step_10" and not found.refused and not found.unfinished
    assert json.loads((out / "run.json").read_text())["status"] == "failed"
    assert events(out)[-1] == ["run_end", "failed"] and not (out / "model").exists()


def test_a_full_disk_leaves_the_earlier_checkpoint_alone(tmp_path: Path, small: Write) -> None:
    out = tmp_path / "r"
    with pytest.raises(CheckpointError) as caught:
        run(load_config(small(trainer="full_at = 2")), out)
    assert "step_8: the disk is full; step_4 before it is untouched" in str(caught.value)
    assert "\n" not in str(caught.value)
    found = latest_good(out / "checkpoints")
    assert found.path == out / "checkpoints" / "step_4" and not (out / "checkpoints" / "step_8").exists()


def test_a_disk_that_fills_up_under_the_metrics_is_one_line(
    tmp_path: Path, small: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from lwm_core.metrics import MetricsLog

    def full(self: MetricsLog, row: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(MetricsLog, "write", full)
    with pytest.raises(CheckpointError, match="the disk is full; free space, then lwm resume"):
        run(load_config(small()), tmp_path / "r")


def interrupted(
    out: Path, path: Path, monkeypatch: pytest.MonkeyPatch, after: int, overrides: Sequence[str] = ()
) -> None:
    """A run that breaks off, as if the machine had gone down, once ``after`` checkpoints are complete."""
    commit, count = checkpoint.commit, 0

    def counted(folder: Path, state: Any) -> None:
        nonlocal count
        if count == after:
            raise SystemError("gone")
        commit(folder, state)
        count += 1

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="gone"):
        patch.setattr(checkpoint, "commit", counted)
        run(load_config(path, overrides), out)


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4])
def test_a_run_that_broke_off_ends_as_an_undisturbed_one(
    tmp_path: Path, small: Write, exact_rows: Rows, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    path = small(evals='{name = "tally"}')
    run(load_config(path), tmp_path / "whole")
    interrupted(tmp_path / "r", path, monkeypatch, after)
    resume(tmp_path / "r")
    assert exact_rows(tmp_path / "r") == exact_rows(tmp_path / "whole")
    for name in ("model/model.safetensors", "evals/tally.json"):
        assert (tmp_path / "r" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_a_kill_between_a_save_and_its_clearing_up_left_over_is_cleared_up(
    tmp_path: Path, small: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = small(), tmp_path / "r"

    def gone(checkpoints: Path, keep: int) -> None:
        if len(step_folders(checkpoints)) > keep + 1:
            raise SystemError("gone")

    with monkeypatch.context() as patch, pytest.raises(SystemError, match="gone"):
        patch.setattr(checkpoint, "prune", gone)
        run(load_config(path), out)
    assert [one.name for one in step_folders(out / "checkpoints")] == [f"step_{n}" for n in (15, 12, 10, 8, 4)]
    resume(out)
    assert [one.name for one in step_folders(out / "checkpoints")] == ["step_15", "step_12", "step_10"]


@pytest.mark.parametrize("damage", ["truncated", "edited"])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(
    tmp_path: Path, small: Write, exact_rows: Rows, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    path = small()
    run(load_config(path), tmp_path / "whole")
    interrupted(tmp_path / "r", path, monkeypatch, 3)
    state = tmp_path / "r" / "checkpoints" / "step_10" / "trainer" / "state_0.npz"
    whole = state.read_bytes()
    middle = len(whole) // 2
    state.write_bytes(whole[:middle] if damage == "truncated" else whole[:middle] + b"!" + whole[middle + 1 :])
    notes = Notes()
    resume(tmp_path / "r", progress=notes)
    assert any("step_10 is refused: trainer/state_0.npz" in line for line in notes.lines)
    assert any("continuing" in line and "from step_8" in line for line in notes.lines)
    assert exact_rows(tmp_path / "r") == exact_rows(tmp_path / "whole")


def test_when_no_checkpoint_is_good_nothing_is_started_over(
    tmp_path: Path, small: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path / "r", small(), monkeypatch, 2)
    before = (tmp_path / "r" / "metrics.jsonl").read_bytes()
    for folder in step_folders(tmp_path / "r" / "checkpoints"):
        (folder / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="none of its checkpoints is good"):
        resume(tmp_path / "r")
    assert (tmp_path / "r" / "metrics.jsonl").read_bytes() == before


def test_lost_metrics_are_told(tmp_path: Path, small: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path / "r", small(), monkeypatch, 2)
    (tmp_path / "r" / "metrics.jsonl").write_text("")
    notes = Notes()
    resume(tmp_path / "r", progress=notes)
    assert any("8 of the 8 steps that are done are lost in it" in line for line in notes.lines)


def test_a_finished_run_says_so(tmp_path: Path, small: Write) -> None:
    run(load_config(small()), tmp_path / "r")
    before = {p: p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()}
    outcome = resume(tmp_path / "r")
    assert outcome.already and outcome.steps == 15
    assert {p: p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()} == before


def test_a_schedule_that_changed_is_not_continued(
    tmp_path: Path, small: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path / "r", small(), monkeypatch, 2)
    values = json.loads((tmp_path / "r" / "run.json").read_text())
    values["config"]["stages"][1]["seq_len"] = 32
    (tmp_path / "r" / "run.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="the schedule is not what it was"):
        resume(tmp_path / "r")


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("data.path=gone.txt", DataError, "no such file"),
        ("stages.1.seq_len=131072", DataError, "needs 131073"),
        ("trainer.devices=3", ConfigError, "is not a multiple of 6"),
        ("stages.1.mesh=2,1,1,1", ConfigError, "needs 2 devices, but 1 are here"),
        ("model.num_kv_heads=3", ConfigError, "num_kv_heads"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(
    tmp_path: Path, small: Write, override: str, error: type[Exception], message: str
) -> None:
    more = ["stages.1.batch_tokens=131072"] if "131072" in override else []
    with pytest.raises(error, match=message):
        run(load_config(small(), [override, *more]), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_folder_in_use_is_left_as_it_is(tmp_path: Path, small: Write) -> None:
    out = tmp_path / "r"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="not empty: choose another folder"):
        run(load_config(small()), out)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    run(load_config(small()), tmp_path / "done")
    with pytest.raises(UsageError, match=r"continue it with lwm resume .*done, or choose"):
        run(load_config(small()), tmp_path / "done")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        run(load_config(small()), tmp_path / "file")


def test_two_processes_do_not_run_one_folder(tmp_path: Path, small: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path / "r", small(), monkeypatch, 1)
    with RunFolder(tmp_path / "r").locked(), pytest.raises(UsageError, match="is in use"):
        resume(tmp_path / "r")
    resume(tmp_path / "r")


def test_what_was_trained_is_reopened_from_the_model_or_a_checkpoint(
    tmp_path: Path, small: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small()
    run(load_config(path), tmp_path / "whole")
    opened = reopen(tmp_path / "whole")
    assert opened.source == tmp_path / "whole" / "model" and opened.stage.name == "long"
    expected = read_model_folder(tmp_path / "whole" / "model").parameters
    assert all((value == expected[name]).all() for name, value in opened.trainer.iter_parameters())
    interrupted(tmp_path / "r", path, monkeypatch, 2)
    opened = reopen(tmp_path / "r")
    assert opened.source.name == "step_8" and opened.stage.name == "short"
    interrupted(tmp_path / "none", path, monkeypatch, 0)
    with pytest.raises(CheckpointError, match="neither a final model nor a good checkpoint"):
        reopen(tmp_path / "none")
