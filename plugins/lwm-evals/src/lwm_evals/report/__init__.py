"""``report.html``: one self-contained page of a run, made from what lies in its folder and from nothing else."""

from __future__ import annotations

from pathlib import Path

from lwm_evals.files import write_atomically
from lwm_evals.report.collect import read_run
from lwm_evals.report.view import page

FILE = "report.html"

__all__ = ["FILE", "write_report"]


def write_report(folder: Path) -> Path:
    """Write ``<folder>/report.html`` and return its path; parts that the run does not have yet are left out.

    Raises:
        UsageError: the folder is not a run's.
    """
    path = Path(folder) / FILE
    write_atomically(path, page(read_run(Path(folder))).encode())
    return path
