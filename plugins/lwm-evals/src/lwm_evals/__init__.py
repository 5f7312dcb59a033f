"""Long-context evaluation: the suite ``needle`` and the run report.

Public names are imported on first use, so that reading the plugin's specs (``lwm_evals._lwm``) costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lwm_evals.needle import NeedleSuite
    from lwm_evals.options import NeedleOptions
    from lwm_evals.report import write_report

_LAZY = {
    "NeedleOptions": "lwm_evals.options",
    "NeedleSuite": "lwm_evals.needle",
    "write_report": "lwm_evals.report",
}

__all__ = ["NeedleOptions", "NeedleSuite", "write_report"]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
