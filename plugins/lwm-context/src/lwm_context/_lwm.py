"""What this distribution offers; nothing heavy is imported here."""

from __future__ import annotations

from lwm_core.registry import PluginSpec

progressive = PluginSpec(
    name="progressive",
    summary="grows the context in stages, by rule or by list, with RoPE theta or a RoPE scaling",
    factory="lwm_context.progressive:progressive",
    options="lwm_context.options:ProgressiveOptions",
)
