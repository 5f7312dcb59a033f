"""Making things ahead in a thread, and what is told of the work meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from lwm_core.errors import DataError
from lwm_vqgan.ahead import made_ahead
from lwm_vqgan.progress import BarProgress, EncodeProgress, LineProgress, make_progress


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "lwm-decode"]


def test_so_many_are_made_ahead_and_no_more() -> None:
    """Three wait in the queue and one in the maker's hand; all come, in order."""
    made: list[int] = []

    def maker() -> Iterator[int]:
        for number in range(50):
            made.append(number)
            yield number

    items = made_ahead(maker(), 3)
    assert next(items) == 0
    time.sleep(0.3)
    assert len(made) == 5
    assert list(items) == list(range(1, 50)) and not threads()


def test_what_breaks_is_raised_in_its_place() -> None:
    def maker() -> Iterator[int]:
        yield 1
        raise DataError("broken")

    items = made_ahead(maker(), 4)
    assert next(items) == 1
    with pytest.raises(DataError, match="broken"):
        next(items)
    assert not threads()


def test_closing_ends_the_thread_and_the_maker() -> None:
    closed = threading.Event()

    def maker() -> Iterator[int]:
        try:
            yield from range(10**9)
        finally:
            closed.set()

    items = made_ahead(maker(), 2)
    assert next(items) == 0
    items.close()
    assert closed.is_set() and not threads()


def test_time_left_follows_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files of 100 and 300 bytes; the first batch, which compiles, does not count."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    progress = EncodeProgress()
    progress.begin(400, 0)
    progress.source("a.mp4", 100, 10, 0)
    now[0] = 60.0  # a long compilation
    progress.frames(5)
    progress.show()
    assert progress.share == 0.125 and progress.rate is None and progress.left is None
    assert progress.facts() == "5 frames · --:-- left"
    now[0] = 62.0
    progress.frames(5)
    progress.ended("")
    progress.show()
    assert progress.share == 0.25 and progress.rate == 2.5
    assert progress.left == pytest.approx(2.0 / 0.125 * 0.75)
    assert progress.facts() == "10 frames · 2.5 frames/s · 00:12 left"
    progress.source("b.mp4", 300, 30, 15)  # half of it was there already
    assert progress.share == 0.25 + 0.375


def test_bar_and_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Names with brackets are names; a line comes every ten seconds; quiet shows warnings alone."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for progress in (BarProgress(), LineProgress(), make_progress(quiet=True)):
        progress.begin(10, 0)
        progress.source("[bold]a[/].mp4", 10, 4, 0)
        progress.frames(1)
        progress.show()
        now[0] += 11
        progress.frames(1)
        progress.show()
        progress.ended("is broken")
        progress.close()
        errors = capsys.readouterr().err
        assert "[bold]a[/].mp4: is broken; kept up to there" in errors
        if isinstance(progress, LineProgress):
            assert "[bold]a[/].mp4 · 50% · 2 frames" in errors
    assert isinstance(make_progress(quiet=False), LineProgress), "standard error is no terminal here"
