"""Codes of pictures and videos on disk: a folder of shards.

Written so that a kill at any moment loses seconds, and read at any (video, frame) without reading the rest.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lwm_vqgan.shards.encode import EncodeJob, encode_sources
    from lwm_vqgan.shards.layout import Settings, Video
    from lwm_vqgan.shards.reader import Shards, open_shards

_HOMES = {
    "EncodeJob": "encode",
    "Settings": "layout",
    "Shards": "reader",
    "Video": "layout",
    "encode_sources": "encode",
    "open_shards": "reader",
}

__all__ = ["EncodeJob", "Settings", "Shards", "Video", "encode_sources", "open_shards"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
