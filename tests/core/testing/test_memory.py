"""How much memory a process takes: its own, and not that of the one that started it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lwm_core.testing.memory import can_measure, peak_until_exit

pytestmark = pytest.mark.skipif(not can_measure(), reason="memory is read from /proc")
HOLD = "import sys, time; held = bytearray(int(sys.argv[1])); held[::4096] = b'x' * len(held[::4096]); time.sleep(0.5)"


@pytest.mark.parametrize("size", [0, 200_000_000])
def test_the_peak_of_a_process_is_its_own(size: int) -> None:
    mine = bytearray(400_000_000)
    mine[::4096] = b"x" * len(mine[::4096])  # resident, as a long test run's memory is
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(size)])
    assert size < peak_until_exit(process) < size + 100_000_000
    assert process.returncode == 0
    del mine
