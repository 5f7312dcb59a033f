"""What the C library does with memory that is freed on a CPU."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_GIVEN_BACK, _USUAL = 4 << 20, 32 << 20


@contextmanager
def blocks_given_back(device: torch.device) -> Iterator[None]:
    """On Linux with glibc, blocks from 4 MiB on go back to the system as soon as they are freed.

    glibc raises its threshold for that to 32 MiB by itself (``mallopt(3)``, M_MMAP_THRESHOLD). What is smaller then
    comes out of a heap with holes, and a long text's slices left up to a kilobyte of them for every five that were in
    use. Afterwards the threshold is where it would have gone. Nothing changes on other systems and devices.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if (device.type, sys.platform) == ("cpu", "linux") else None
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _GIVEN_BACK)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _USUAL)
