"""The committed table of compiled steps, the command, and what the tests import from each other (``plan_cases``)."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lwm_core.cli import main

sys.path.insert(0, str(Path(__file__).parent))
AOT = Path(__file__).parents[3] / "docs" / "benchmarks" / "aot.json"


@pytest.fixture(scope="session")
def compiled() -> list[dict[str, Any]]:
    """What the TPU compiler said of LWM's stages."""
    rows: list[dict[str, Any]] = json.loads(AOT.read_text())["rows"]
    return rows


@pytest.fixture
def lwm(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command; gives its code, its output and its errors."""

    def run(*words: str) -> tuple[int, str, str]:
        try:
            code = main(["plan", *words])
        except SystemExit as stopped:
            code = int(str(stopped.code))
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run
