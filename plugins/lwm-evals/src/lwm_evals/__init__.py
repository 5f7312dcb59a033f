"""Evaluation: needles in long text and video, loss of video, reconstruction, and the run report.

Public names are imported on first use, so that reading the plugin's specs (``lwm_evals._lwm``) costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lwm_evals.needle import NeedleSuite
    from lwm_evals.options import (
        NeedleOptions,
        ReconstructionOptions,
        VideoContinuationOptions,
        VideoLossOptions,
        VideoNeedleOptions,
    )
    from lwm_evals.reconstruction import ReconstructionSuite
    from lwm_evals.report import write_report
    from lwm_evals.video_continuation import VideoContinuationSuite
    from lwm_evals.video_loss import VideoLossSuite
    from lwm_evals.video_needle import VideoNeedleSuite

_LAZY = {
    "NeedleOptions": "lwm_evals.options",
    "NeedleSuite": "lwm_evals.needle",
    "ReconstructionOptions": "lwm_evals.options",
    "ReconstructionSuite": "lwm_evals.reconstruction",
    "VideoContinuationOptions": "lwm_evals.options",
    "VideoContinuationSuite": "lwm_evals.video_continuation",
    "VideoLossOptions": "lwm_evals.options",
    "VideoLossSuite": "lwm_evals.video_loss",
    "VideoNeedleOptions": "lwm_evals.options",
    "VideoNeedleSuite": "lwm_evals.video_needle",
    "write_report": "lwm_evals.report",
}

__all__ = [
    "NeedleOptions",
    "NeedleSuite",
    "ReconstructionOptions",
    "ReconstructionSuite",
    "VideoContinuationOptions",
    "VideoContinuationSuite",
    "VideoLossOptions",
    "VideoLossSuite",
    "VideoNeedleOptions",
    "VideoNeedleSuite",
    "write_report",
]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
