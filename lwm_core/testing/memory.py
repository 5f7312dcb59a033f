"""How much memory a piece of work takes, as the operating system sees it."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def can_measure() -> bool:
    """Whether this system (Linux) tells :func:`peak_growth` and :func:`peak_until_exit`."""
    return _CLEAR.exists()


def peak_growth(work: Callable[[], object]) -> int:
    """Bytes by which this process grew at most while ``work`` ran: all that is resident, mapped files included.

    What the process had freed but kept is given back first, so that taking it again is seen.
    """
    _give_back()
    _CLEAR.write_text("5")  # proc(5): resets the peak
    before = _resident(_STATUS, "VmRSS")
    work()
    return _resident(_STATUS, "VmHWM") - before


def peak_until_exit(process: subprocess.Popen[Any], every: float = 0.05) -> int:
    """Bytes of ``process`` that were resident at most, looked at every so many seconds until it has ended.

    Not ``ru_maxrss``: Linux counts there what the process that started it held before ``exec``, too. Nobody reads its
    pipes meanwhile: it should write no more to them than they hold (64 KiB), or to files.
    """
    peak, status = 0, Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        with suppress(StopIteration):  # it ended just now
            peak = max(peak, _resident(status, "VmHWM"))
        time.sleep(every)
    return peak


def _give_back() -> None:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def _resident(status: Path, field: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
