"""What this distribution offers; nothing heavy is imported here."""

from __future__ import annotations

from lwm_core.registry import PluginSpec

tensorboard = PluginSpec(
    name="tensorboard",
    summary="writes metrics, stages and the run's end as TensorBoard events",
    factory="lwm_tensorboard.hooks:TensorBoardHooks",
    needs=("tensorboard",),
)
