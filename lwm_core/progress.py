"""What people see while a run goes on: a bar in a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Protocol

from lwm_core.launched import launched_rank
from lwm_core.protocols import Stage

_SMOOTHING = 0.9  # of the step time that the time left is told from; the first step of a stage compiles


class Progress(Protocol):
    """Hears what the run does. All calls come from the main thread."""

    def note(self, line: str) -> None:
        """A line that people should see."""
        ...

    def begin_stage(self, stage: Stage, done: int) -> None:
        """A stage begins, ``done`` of its steps being done already."""
        ...

    def step(self, row: Mapping[str, Any]) -> None:
        """A step is done; ``row`` is its line of the metrics."""
        ...

    def evaluating(self, what: str, done: int, total: int) -> None:
        """An evaluation stands at ``done`` of ``total`` samples."""
        ...

    def close(self) -> None:
        """The run ends."""
        ...


class TimeLeft:
    """Seconds left of a stage, from a running mean of its step times; the first, which compiles, does not count."""

    def __init__(self, steps: int, done: int) -> None:
        self._left = steps - done
        self._mean: float | None = None
        self._first = True

    def step(self, seconds: float) -> float | None:
        """A step took so long; the seconds left, None while nothing can be said."""
        self._left -= 1
        if self._first:
            self._first = False
        elif self._mean is None:
            self._mean = seconds
        else:
            self._mean = _SMOOTHING * self._mean + (1 - _SMOOTHING) * seconds
        return None if self._mean is None else self._mean * self._left


def clock(seconds: float | None) -> str:
    """``1:02:03``, ``02:03``, or ``--:--``."""
    if seconds is None:
        return "--:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute:02d}:{second:02d}"


def rates(row: Mapping[str, Any]) -> str:
    """``loss 2.3456 · 12.3k tok/s · MFU 41.2%``."""
    speed = row["tokens_per_second"]
    shown = f"{speed / 1000:.1f}k" if speed >= 1000 else f"{speed:.0f}"
    utilisation = "" if row["mfu"] is None else f" · MFU {100 * row['mfu']:.1f}%"
    return f"loss {row['loss']:.4f} · {shown} tok/s{utilisation}"


class QuietProgress:
    """Only the lines that warn."""

    def note(self, line: str) -> None:
        """Print the line."""
        print(line, file=sys.stderr)

    def begin_stage(self, stage: Stage, done: int) -> None:
        """Nothing to show."""

    def step(self, row: Mapping[str, Any]) -> None:
        """Nothing to show."""

    def evaluating(self, what: str, done: int, total: int) -> None:
        """Nothing to show."""

    def close(self) -> None:
        """Nothing to show."""


class SilentProgress(QuietProgress):
    """Nothing at all: of several processes, rank 0 alone speaks."""

    def note(self, line: str) -> None:
        """Nothing to show."""


class LineProgress(QuietProgress):
    """A line every ``log_every`` steps, for logs and pipes."""

    def __init__(self, log_every: int) -> None:
        self._every = log_every
        self._left = TimeLeft(0, 0)
        self._steps = 0

    def begin_stage(self, stage: Stage, done: int) -> None:
        """Say what begins."""
        self._left = TimeLeft(stage.steps, done)
        self._steps = stage.steps
        start = f", continued at {done}" if done else ""
        self.note(f"stage {stage.name}: {stage.seq_len} tokens a row, {stage.steps} steps{start}")

    def step(self, row: Mapping[str, Any]) -> None:
        """Print a line where one is due."""
        left = self._left.step(row["step_seconds"])
        if row["stage_step"] % self._every == 0 or row["stage_step"] == self._steps:
            self.note(f"{row['stage']} {row['stage_step']}/{self._steps} · {rates(row)} · {clock(left)} left")

    def evaluating(self, what: str, done: int, total: int) -> None:
        """Say that an evaluation is through."""
        if done == total:
            self.note(f"{what}: {done} samples")


class BarProgress:
    """A rich progress bar with tokens/s, MFU, loss and the stage's time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self._console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"), console=self._console, transient=True,
        )  # fmt: skip
        self._bar.start()
        self._stage = self._bar.add_task("starting", total=None, facts="")
        self._evaluation: Any = None
        self._left = TimeLeft(0, 0)
        self._last = ""

    def note(self, line: str) -> None:
        """Print the line above the bar."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def begin_stage(self, stage: Stage, done: int) -> None:
        """A new bar; the last one's final line stays."""
        self._end_stage()
        self._left = TimeLeft(stage.steps, done)
        self._bar.reset(
            self._stage, description=f"stage {stage.name}", total=stage.steps, completed=done, facts="compiling"
        )

    def step(self, row: Mapping[str, Any]) -> None:
        """Move on by one."""
        left = self._left.step(row["step_seconds"])
        self._last = f"stage {row['stage']}: {row['stage_step']} steps · {rates(row)}"
        self._bar.update(self._stage, completed=row["stage_step"], facts=f"{rates(row)} · {clock(left)} left")

    def evaluating(self, what: str, done: int, total: int) -> None:
        """A second bar while an evaluation runs."""
        if self._evaluation is None:
            self._evaluation = self._bar.add_task(what, total=total, facts="samples")
        self._bar.update(self._evaluation, description=what, completed=done, total=total)
        if done == total:
            self._bar.remove_task(self._evaluation)
            self._evaluation = None

    def close(self) -> None:
        """Take the bar away."""
        self._end_stage()
        self._bar.stop()

    def _end_stage(self) -> None:
        if self._last:
            self.note(self._last)
            self._last = ""


def make_progress(log_every: int, *, quiet: bool) -> Progress:
    """The one that fits where standard error goes; none of them for a process that follows another."""
    if launched_rank():
        return SilentProgress()
    if quiet:
        return QuietProgress()
    return BarProgress() if sys.stderr.isatty() else LineProgress(log_every)
