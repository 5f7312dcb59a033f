"""The committed table of compiled steps; and lets the tests import what they share (``plan_cases``)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
AOT = Path(__file__).parents[3] / "docs" / "benchmarks" / "aot.json"


@pytest.fixture(scope="session")
def compiled() -> list[dict[str, Any]]:
    """What the TPU compiler said of LWM's stages."""
    rows: list[dict[str, Any]] = json.loads(AOT.read_text())["rows"]
    return rows
