"""What this distribution offers; nothing heavy is imported here."""

from __future__ import annotations

from lwm_core.registry import PluginSpec

tiny_base = PluginSpec(
    name="tiny-base",
    summary="six million parameters trained at 256 tokens on the King James Bible, copying and needles",
    factory="lwm_tiny_base.bundle:tiny_base",
)
