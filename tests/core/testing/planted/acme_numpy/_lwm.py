"""The light spec."""

from __future__ import annotations

from lwm_core.registry.spec import PluginSpec

attention = PluginSpec(
    name="acme-numpy",
    summary="a ring over pretended ranks, in NumPy",
    factory="acme_numpy.backend:factory",
    options="acme_numpy.options:Options",
    devices=("cpu",),
    capabilities={
        "masks": ("causal", "full", "block_causal", "window"),
        "gqa": True,
        "dtypes": ("float32", "bfloat16"),
        "strategies": ("ring",),
        "layouts": ("contiguous", "zigzag", "striped"),
    },
)
