"""What this distribution offers; nothing heavy is imported here."""

from __future__ import annotations

from lwm_core.registry import PluginSpec

tiny_base = PluginSpec(
    name="tiny-base",
    summary="six million parameters that know needles in texts of 256 tokens, and clips of seven frames",
    factory="lwm_tiny_base.bundle:tiny_base",
)
