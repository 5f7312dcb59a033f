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
    """Whether an end was asked for.

    Args:
        asked: called when one is, here or in another process of the run.

    Attributes:
        signal_number: of the request that this process knows of; 0 for none.
        agreed: what all processes of the run knew when they last agreed; see ``lwm_core.run.processes.together``.
    """

    def __init__(self, asked: Callable[[], None] = lambda: None) -> None:
        self.signal_number = 0
        self.agreed = 0
        self._asked = asked

    def ask(self, number: int) -> None:
        """A signal has come."""
        self.signal_number = number
        self._asked()

    def hear(self, number: int) -> None:
        """The processes have agreed on ``number``."""
        if number and not self.signal_number:
            self.ask(number)
        self.agreed = number

    def check(self) -> None:
        """Raise :class:`StoppedError` if this process knows of a request; for places where nothing needs saving.

        Only rank 0 may ask this way, alone or while it leads; see ``lwm_core.run.processes.heed``.
        """
        if self.signal_number:
            raise StoppedError(self.signal_number)


@contextmanager
def signals_heard(tell: Callable[[str], None]) -> Iterator[Stop]:
    """Turn the signals into a :class:`Stop` inside the ``with``; outside of the main thread none come."""
    if threading.current_thread() is not threading.main_thread():
        yield Stop()
        return

    def asked() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        tell("stopping after this step and saving; Ctrl-C again stops at once, without saving")

    stop = Stop(asked)

    def handle(number: int, frame: FrameType | None) -> None:
        stop.ask(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
