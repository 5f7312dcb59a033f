"""The hooks plugin ``report``."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from lwm_core.registry import hookimpl


class _RunOnDisk(Protocol):
    folder: Path


class ReportHooks:
    """Writes ``report.html`` into a run's folder when a report is asked for."""

    @hookimpl
    def lwm_report(self, run: _RunOnDisk) -> Path | None:
        """The report's path; it is made from what lies in ``run.folder`` alone."""
        # Imported here: hooks plugins are loaded at every run's start, a report is drawn once.
        from lwm_evals.report import write_report

        return write_report(run.folder)
