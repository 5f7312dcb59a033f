"""Pictures and videos into a folder of codes (``lwm_core.shards``), so that a kill at any moment loses seconds."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lwm_vqgan.shards.encode import EncodeJob, encode_sources

_HOMES = {"EncodeJob": "encode", "encode_sources": "encode"}

__all__ = ["EncodeJob", "encode_sources"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
