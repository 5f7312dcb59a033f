"""What people see while videos are encoded: a bar in a terminal, lines elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from typing import Any

from lwm_core.progress import clock

_LINE_SECONDS = 10.0


class EncodeProgress:
    """Counts frames, and tells time left from the share of the sources' bytes that is through. Shows nothing itself.

    A video's bytes are taken to be spread evenly over the frames that are taken of it.
    """

    def __init__(self) -> None:
        self.done = 0
        self._name = ""
        self._size = self._length = self._of_source = 0
        self._total = self._before = 1.0
        # When the first batch, which compiles, was through, and what was through then.
        self._began: tuple[float, int, float] | None = None

    def begin(self, total: int, done: int) -> None:
        """``total`` bytes are to be encoded, ``done`` of which are."""
        self._total, self._before = float(max(total, 1)), float(done)

    def source(self, name: str, size: int, frames: int, done: int) -> None:
        """A source of ``size`` bytes begins, with ``done`` of its ``frames``."""
        self._name, self._size, self._length, self._of_source = name, size, frames, done

    def ended(self, broken: str) -> None:
        """The source is through."""
        if broken:
            self.note(f"{self._name}: {broken}; {'kept up to there' if self._of_source else 'left out'}")
        self._before += self._size
        self._size = self._of_source = 0

    def frames(self, count: int) -> None:
        """So many frames more are encoded."""
        self.done += count
        self._of_source += count

    @property
    def share(self) -> float:
        """How much of all bytes is through."""
        part = min(1.0, self._of_source / self._length) if self._length else 0.0
        return min(1.0, (self._before + part * self._size) / self._total)

    @property
    def rate(self) -> float | None:
        """Frames a second, the first batch left out; None while nothing can be said."""
        if self._began is None:
            return None
        began, frames, _ = self._began
        seconds = time.perf_counter() - began
        return (self.done - frames) / seconds if self.done > frames and seconds > 0 else None

    @property
    def left(self) -> float | None:
        """Seconds left, None while nothing can be said."""
        if self._began is None or self.share <= self._began[2]:
            return None
        began, _, share = self._began
        return (time.perf_counter() - began) * (1 - self.share) / (self.share - share)

    def facts(self) -> str:
        """``1,024 frames · 53.2 frames/s · 02:03 left``."""
        rate = "" if self.rate is None else f" · {self.rate:.1f} frames/s"
        return f"{self.done:,} frames{rate} · {clock(self.left)} left"

    def show(self) -> None:
        """A batch is through."""
        if self._began is None:
            self._began = (time.perf_counter(), self.done, self.share)

    def note(self, line: str) -> None:
        """A line that people should see."""
        print(line, file=sys.stderr)

    def close(self) -> None:
        """The work ends."""


class LineProgress(EncodeProgress):
    """A line every ten seconds, for logs and pipes."""

    _shown = 0.0

    def show(self) -> None:
        """Print a line where one is due."""
        super().show()
        now = time.monotonic()
        if not self._shown:
            self._shown = now
        if now - self._shown >= _LINE_SECONDS:
            self._shown = now
            self.note(f"{self._name} · {100 * self.share:.0f}% · {self.facts()}")


class BarProgress(EncodeProgress):
    """A rich progress bar of the bytes, with frames/s and the time left."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn
        from rich.progress import Progress as Bar

        self._console = Console(stderr=True)
        self._bar: Any = Bar(
            TextColumn("[bold]{task.description}", markup=True), BarColumn(bar_width=24), TaskProgressColumn(),
            TextColumn("{task.fields[facts]}"), console=self._console, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task("starting", total=1.0, facts="")
        self._bar.start()

    def show(self) -> None:
        """Move on."""
        from rich.markup import escape

        super().show()
        self._bar.update(self._task, description=escape(self._name), completed=self.share, facts=self.facts())

    def note(self, line: str) -> None:
        """Print the line above the bar."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.stop()


def make_progress(*, quiet: bool) -> EncodeProgress:
    """The one that fits where standard error goes."""
    if quiet:
        return EncodeProgress()
    return BarProgress() if sys.stderr.isatty() else LineProgress()
