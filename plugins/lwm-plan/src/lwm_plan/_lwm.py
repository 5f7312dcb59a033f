"""What this distribution offers, in words; nothing heavy is imported here."""

from __future__ import annotations

from lwm_core.registry.spec import PluginSpec

plan = PluginSpec(
    name="plan",
    summary="What a recipe's stages take on a machine: memory, time, what hides, meshes, and ways out",
    factory="lwm_plan.verb:add_plan",
)
"""``lwm plan RECIPE|FILE|FOLDER``: memory, time and meshes before a device is rented."""
