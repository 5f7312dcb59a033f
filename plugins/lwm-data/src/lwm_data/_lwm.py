"""What the plugin registry reads: nothing heavy is imported here."""

from __future__ import annotations

from lwm_core.registry.spec import PluginSpec

mix = PluginSpec(
    name="mix",
    summary="Texts, clips with captions, needles and copying tasks, mixed by weight and packed with document masks",
    factory="lwm_data.feed:open_mix",
    options="lwm_data.options:MixOptions",
    needs=("grain",),
)
