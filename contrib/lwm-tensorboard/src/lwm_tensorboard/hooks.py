"""The hooks: what a run tells, sorted into TensorBoard's tags."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

from lwm_core.registry import hookimpl
from lwm_tensorboard.events import EventFile

FOLDER = "tensorboard"

# Metrics that say where and when a step was; events have fields of their own for that, or a stage tag tells it.
_PLACE = frozenset({"step", "stage", "stage_index", "stage_step", "tokens", "time"})
_SPEED = frozenset({"step_seconds", "tokens_per_second", "mfu"})


class TensorBoardHooks:
    """Writes ``RUN/tensorboard/``. A file is begun at the first step of a start, for only then its step is known."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._file: EventFile | None = None
        self._stage: Any = None
        self._step = 0

    @hookimpl
    def lwm_run_start(self) -> None:
        """Forget the run before, if there was one in this process."""
        self._close()
        self._begin()

    @hookimpl
    def lwm_stage_change(self, new: Any) -> None:
        """Keep the stage until its first step."""
        self._stage = new

    @hookimpl
    def lwm_step_end(self, run: Any, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the step's numbers, and the stage before its first."""
        if self._file is None:
            self._file = EventFile(run.folder / FOLDER, first_step=step)
        scalars, texts = _scalars(metrics), {}
        if self._stage is not None:
            scalars |= _stage_scalars(self._stage)
            texts["stage/name"] = str(self._stage.name)
            self._stage = None
        self._file.add(step, scalars, texts, wall_time=metrics.get("time"))
        self._step = step

    @hookimpl
    def lwm_run_end(self, status: str) -> None:
        """Write how the run ended. A start that trained nothing leaves no file."""
        if self._file is not None:
            self._file.add(self._step, {}, {"run/status": status})
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


def _scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Tag → value of every number that is known."""
    return {
        f"{'speed' if key in _SPEED else 'train'}/{key}": float(value)
        for key, value in metrics.items()
        if key not in _PLACE and isinstance(value, Real)
    }


def _stage_scalars(stage: Any) -> dict[str, float]:
    return {
        "stage/seq_len": float(stage.seq_len),
        "stage/batch_tokens": float(stage.batch_tokens),
        "stage/rope_theta": float(stage.rope.theta),
    }
