"""The hooks `tensorboard`: events read back by TensorBoard's own reader, across resumes, crashes and odd metrics."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as ServerAccumulator

from lwm_core.protocols import Stage
from lwm_core.registry.hooks import HookManager
from lwm_core.rope import RopeSpec
from lwm_tensorboard._lwm import tensorboard
from lwm_tensorboard.hooks import TensorBoardHooks

SHORT, LONG = (
    Stage(name, length, RopeSpec(theta), tokens=1 << 20, batch_tokens=1 << 16, lr=1e-3, min_lr=1e-4)
    for name, length, theta in (("1K", 1024, 1e4), ("4K", 4096, 1e6))
)


@dataclass(frozen=True)
class Run:
    """As much of a run as hooks may rely on."""

    folder: Path


def row(step: int, loss: float) -> dict[str, object]:
    """A step's metrics as the run loop has them, words and unknown values included."""
    return {
        "step": step, "stage": "1K", "stage_index": 0, "stage_step": step, "tokens": 1 << 16, "loss": loss,
        "loss_text": loss, "grad_norm": 2.0, "lr": 1e-3, "step_seconds": 0.5, "tokens_per_second": 131072.0,
        "mfu": None, "time": 1.7e9 + step,
    }  # fmt: skip


def start(
    folder: Path, steps: Sequence[int], losses: Sequence[float], *, status: str | None = "done",
    changes: dict[int, tuple[Stage | None, Stage]] | None = None,
) -> None:  # fmt: skip
    """One start of a run, through the real hook manager; ``status`` None is a process that was killed."""
    manager = HookManager()
    manager.register(TensorBoardHooks(), "lwm-tensorboard:tensorboard")
    assert manager.check_pending() == []
    run = Run(folder)
    manager.hook.lwm_run_start(run=run)
    for step, loss in zip(steps, losses, strict=True):
        if changes and step in changes:
            old, new = changes[step]
            manager.hook.lwm_stage_change(run=run, old=old, new=new)
        manager.hook.lwm_step_end(run=run, step=step, metrics=row(step, loss))
    if status is not None:
        manager.hook.lwm_run_end(run=run, status=status)
    assert manager.failed == {}


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def curve(folder: Path, tag: str = "train/loss") -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def read_as_server(folder: Path) -> ServerAccumulator:
    """TensorBoard's server has a reader of its own, which turns scalars into tensors and drops texts too."""
    events = ServerAccumulator(str(folder / "tensorboard"), tensor_size_guidance={"scalars": 0, "text": 0})
    events.Reload()
    return events


def texts(folder: Path, tag: str) -> list[tuple[int, str]]:
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in read_as_server(folder).Tensors(tag)]


@pytest.fixture(autouse=True)
def _faults_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LWM_PLUGINS_STRICT", "1")


def test_a_run_is_read_back(tmp_path: Path) -> None:
    start(tmp_path, [1, 2, 3], [4.0, 3.5, 3.25], changes={1: (None, SHORT), 3: (SHORT, LONG)})
    assert curve(tmp_path) == [(1, 4.0), (2, 3.5), (3, 3.25)]
    assert curve(tmp_path, "speed/tokens_per_second") == [(step, 131072.0) for step in (1, 2, 3)]
    assert curve(tmp_path, "stage/seq_len") == [(1, 1024.0), (3, 4096.0)]
    assert curve(tmp_path, "stage/rope_theta") == [(1, 1e4), (3, 1e6)]
    assert texts(tmp_path, "stage/name") == [(1, "1K"), (3, "4K")]
    assert texts(tmp_path, "run/status") == [(3, "done")]
    assert [event.wall_time for event in read(tmp_path).Scalars("train/loss")] == [1.7e9 + step for step in (1, 2, 3)]
    assert sorted(read(tmp_path).Tags()["scalars"]) == [
        "speed/step_seconds", "speed/tokens_per_second", "stage/batch_tokens", "stage/rope_theta", "stage/seq_len",
        "train/grad_norm", "train/loss", "train/loss_text", "train/lr",
    ]  # fmt: skip


@pytest.mark.parametrize("status", ["stopped", None])
def test_resuming_shows_every_step_once_as_trained_last(tmp_path: Path, status: str | None) -> None:
    start(tmp_path, [1, 2, 3, 4, 5], [5.0, 4.0, 3.0, 2.0, 1.0], status=status, changes={1: (None, SHORT)})
    # The last checkpoint was step 2: steps 3 to 5 are trained again.
    start(tmp_path, [3, 4], [3.5, 2.5], changes={3: (None, SHORT)}, status=status)
    start(tmp_path, [4, 5, 6], [2.75, 1.75, 0.75])
    expected = [(1, 5.0), (2, 4.0), (3, 3.5), (4, 2.75), (5, 1.75), (6, 0.75)]
    assert curve(tmp_path) == expected
    assert texts(tmp_path, "run/status") == [(6, "done")]
    server = read_as_server(tmp_path).Tensors("train/loss")
    assert [(event.step, event.tensor_proto.float_val[0]) for event in server] == expected


def test_resuming_after_a_clean_end_of_the_checkpoint_drops_nothing(tmp_path: Path) -> None:
    start(tmp_path, [1, 2], [2.0, 1.0], status="stopped")
    start(tmp_path, [3], [0.5])
    assert curve(tmp_path) == [(1, 2.0), (2, 1.0), (3, 0.5)]
    assert texts(tmp_path, "run/status") == [(2, "stopped"), (3, "done")]


def test_a_file_cut_short_is_read_up_to_the_cut(tmp_path: Path) -> None:
    start(tmp_path, [1, 2, 3], [3.0, 2.0, 1.0], status=None)
    (first,) = (tmp_path / "tensorboard").iterdir()
    first.write_bytes(first.read_bytes()[:-7])
    start(tmp_path, [3, 4], [1.5, 0.5])
    assert curve(tmp_path) == [(1, 3.0), (2, 2.0), (3, 1.5), (4, 0.5)]


def test_files_are_read_in_the_order_they_were_made_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for now, steps in ((2e9, [1, 2]), (1e9, [2, 3]), (1e9, [3, 4])):
        monkeypatch.setattr("lwm_tensorboard.events.time.time", lambda now=now: now)
        start(tmp_path, steps, [now / 1e9 + step for step in steps])
    assert [step for step, _ in curve(tmp_path)] == [1, 2, 3, 4]
    assert dict(curve(tmp_path))[2] == 3.0, "the second start's"


def test_every_step_is_on_disk_before_the_next(tmp_path: Path) -> None:
    hooks = TensorBoardHooks()
    hooks.lwm_run_start()
    for step in (1, 2):
        hooks.lwm_step_end(run=Run(tmp_path), step=step, metrics=row(step, 1.0))
        assert curve(tmp_path)[-1][0] == step, "read while the file is still open"
    hooks.lwm_run_end(status="done")


def test_a_start_that_trains_nothing_leaves_nothing(tmp_path: Path) -> None:
    start(tmp_path, [], [])
    assert not (tmp_path / "tensorboard").exists()


def test_one_plugin_serves_runs_one_after_another(tmp_path: Path) -> None:
    hooks = TensorBoardHooks()
    for name, loss in (("a", 1.0), ("b", 2.0)):
        hooks.lwm_run_start()
        hooks.lwm_step_end(run=Run(tmp_path / name), step=1, metrics=row(1, loss))
        hooks.lwm_run_end(status="failed")
    assert [curve(tmp_path / name) for name in "ab"] == [[(1, 1.0)], [(1, 2.0)]]


def test_neither_tensorflow_nor_torch_is_imported_even_where_they_are_installed(tmp_path: Path) -> None:
    for name in ("tensorflow", "torch"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('imported')\n")
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(tmp_path)!r})
from lwm_tensorboard._lwm import tensorboard
assert tensorboard.name == "tensorboard"
assert not {{"tensorboard", "numpy", "pluggy"}} & set(sys.modules), "heavy"
from lwm_tensorboard.hooks import TensorBoardHooks
class Run: folder = Path({str(tmp_path / "run")!r})
hooks = TensorBoardHooks()
hooks.lwm_run_start()
hooks.lwm_step_end(Run, 1, {{"loss": 1.0}})
hooks.lwm_run_end("done")
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert curve(tmp_path / "run") == [(1, 1.0)]
    assert tensorboard.factory == f"{TensorBoardHooks.__module__}:{TensorBoardHooks.__name__}"
