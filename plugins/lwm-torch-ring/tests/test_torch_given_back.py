"""Large blocks go back to the system while a long text is scored."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

SCRIPT = """
from pathlib import Path
import torch
from lwm_torch_ring.generate.memory import blocks_given_back

def stays():
    block = torch.ones(8 << 20, dtype=torch.uint8)
    at = block.data_ptr()
    del block
    areas = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(start, 16) <= at < int(end, 16) for start, end in areas)

larger = torch.ones(30 << 20, dtype=torch.uint8)
del larger  # from here on glibc keeps what is smaller
with blocks_given_back(torch.device("cpu")):
    inside = stays()
after = stays()
with blocks_given_back(torch.device("meta")):
    print(inside, after, stays())
"""
"""Whether 8 MB are still there after they were freed. A process that has holes of that size would fill those first."""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc alone has this threshold"
)
def test_a_block_goes_back_at_once_and_later_on_as_before() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", "True", "True"], done.stderr
