"""What the registry reads: light, so that listing plugins costs nothing."""

from __future__ import annotations

from lwm_core.registry import PluginSpec

encoder = PluginSpec(
    name="vqgan",
    summary="Frames to codes and back by the VQGAN of LWM and aMUSEd, or a small one that ships here",
    factory="lwm_vqgan.encoder:vqgan",
    options="lwm_vqgan.options:VqganOptions",
    devices=("cpu", "gpu", "tpu"),
    probe="lwm_vqgan.options:no_framework",
)

verb = PluginSpec(
    name="vqgan",
    summary="Train a VQGAN on pictures, measure one, or make its folder from public weights",
    factory="lwm_vqgan.commands:add_vqgan",
)
