"""Ctrl-C and SIGTERM: the first asks for an end after the step, a second Ctrl-C ends the process at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class StoppedError(BaseException):
    """The run was asked to stop and has saved. No ``Exception``, so that no plugin swallows it.

    Args:
        signal_number: which signal asked.
        message: the line for people: where it stands and how to continue.
    """

    def __init__(self, signal_number: int, message: str = "") -> None:
        super().__init__(message)
        self.signal_number = signal_number

    @property
    def exit_code(self) -> int:
        """128 + signal, as shells have it: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signal_number


class Stop:
    """Whether an end was asked for: ``signal_number`` of the request, 0 for none."""

    def __init__(self) -> None:
        self.signal_number = 0

    def check(self) -> None:
        """Raise :class:`StoppedError` if an end was asked for; for places where nothing needs saving."""
        if self.signal_number:
            raise StoppedError(self.signal_number)


@contextmanager
def signals_heard(tell: Callable[[str], None]) -> Iterator[Stop]:
    """Turn the signals into a :class:`Stop` inside the ``with``; outside of the main thread none come."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        stop.signal_number = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        tell("stopping after this step and saving; Ctrl-C again stops at once, without saving")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
