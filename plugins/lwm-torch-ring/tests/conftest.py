"""Where torch is not installed, the tests of this plugin are left out."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

collect_ignore_glob = [] if find_spec("torch") else ["test_*.py"]
sys.path.insert(0, str(Path(__file__).parent))  # for torch_threads


def pytest_report_header() -> str | None:
    """Said aloud, so that nobody takes it for passed."""
    return "lwm-torch-ring: torch is not installed, so that its tests are left out" if collect_ignore_glob else None
