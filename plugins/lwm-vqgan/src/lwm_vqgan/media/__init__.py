"""Pictures and video in and out: files found, frames sampled, turned upright, cropped, and written again.

Frames are RGB uint8 arrays ``[H,W,3]``, one at a time, so memory does not grow with a video's length. Names are
imported on first use, so that reading the plugin's specs costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lwm_vqgan.media.crop import preprocess
    from lwm_vqgan.media.files import Source, find_sources
    from lwm_vqgan.media.read import Clip, Frame, open_clip
    from lwm_vqgan.media.sampling import Sampling
    from lwm_vqgan.media.write import write_media

_HOMES = {
    "Clip": "read",
    "Frame": "read",
    "Sampling": "sampling",
    "Source": "files",
    "find_sources": "files",
    "open_clip": "read",
    "preprocess": "crop",
    "write_media": "write",
}

__all__ = ["Clip", "Frame", "Sampling", "Source", "find_sources", "open_clip", "preprocess", "write_media"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
