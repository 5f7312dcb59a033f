"""The light spec."""

from __future__ import annotations

from lwm_core.registry.spec import PluginSpec

numpy = PluginSpec(
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

# Wrong in one way each, for the tests of the plugin kit.
silent = PluginSpec(
    name="acme-silent",
    summary="its option has no description",
    factory="acme_numpy.backend:factory",
    options="acme_numpy.options:Silent",
    framework="jax",
)
hollow = PluginSpec(name="acme-hollow", summary="its factory lacks methods", factory="acme_numpy.options:Options")
