"""The spec; nothing heavy is imported here."""

from __future__ import annotations

from lwm_core.registry.spec import PluginSpec

mosaic = PluginSpec(
    name="mosaic",
    summary="Mean colours of a grid of squares, four bits a channel",
    factory="lwm_mosaic.encoder:Mosaic",
    options="lwm_mosaic.encoder:MosaicOptions",
)

liar = PluginSpec(name="liar", summary="Gives codes beyond its codebook", factory="lwm_mosaic.encoder:Liar")
