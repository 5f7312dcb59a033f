"""How much memory a piece of work takes, as the operating system sees it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def can_measure() -> bool:
    """Whether this system (Linux) tells :func:`peak_growth`."""
    return _CLEAR.exists()


def peak_growth(work: Callable[[], object]) -> int:
    """Bytes by which this process grew at most while ``work`` ran: all that is resident, mapped files included.

    What the process had freed but kept is given back first, so that taking it again is seen.
    """
    _give_back()
    _CLEAR.write_text("5")  # proc(5): resets the peak
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _give_back() -> None:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
