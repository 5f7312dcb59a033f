"""Hooks that write down what they hear, in ``events.jsonl`` of the run's folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lwm_core.registry import hookimpl


class Scribe:
    """See the module."""

    def _write(self, run: Any, event: str, *facts: object) -> None:
        with (run.folder / "events.jsonl").open("a") as file:
            file.write(json.dumps([event, *facts]) + "\n")

    @hookimpl
    def lwm_run_start(self, run: Any) -> None:
        self._write(run, "run_start", run.name, len(run.stages))

    @hookimpl
    def lwm_stage_change(self, run: Any, old: Any, new: Any) -> None:
        self._write(run, "stage_change", old and old.name, new.name)

    @hookimpl
    def lwm_step_end(self, run: Any, step: int, metrics: Mapping[str, float]) -> None:
        self._write(run, "step_end", step, metrics["loss"])

    @hookimpl
    def lwm_checkpoint(self, run: Any, path: Path) -> None:
        self._write(run, "checkpoint", path.name, (path / "manifest.json").exists())

    @hookimpl
    def lwm_run_end(self, run: Any, status: str) -> None:
        self._write(run, "run_end", status)

    @hookimpl
    def lwm_report(self, run: Any) -> Path | None:
        if os.environ.get("STANDIN_REPORT") != "1":
            return None
        path: Path = run.folder / "report.html"
        path.write_text("a report")
        return path
