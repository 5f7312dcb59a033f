"""Loading what a run has trained, for ``lwm generate`` and ``lwm eval``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lwm_core.checkpoint import TRAINER, latest_good, read_state
from lwm_core.errors import CheckpointError
from lwm_core.pipeline import Pipeline, build
from lwm_core.protocols import Stage, Trainer
from lwm_core.registry import Registry
from lwm_core.run.folder import RunFolder, open_run
from lwm_core.run.processes import first, make_trainer
from lwm_core.weights import CONFIG_FILE, read_model_folder


@dataclass(frozen=True)
class Reopened:
    """A trained model in its trainer.

    Args:
        folder: the run's.
        pipeline: its parts.
        trainer: holds the parameters, at the stage's RoPE.
        stage: the stage that they come from.
        source: the folder that was read.
    """

    folder: RunFolder
    pipeline: Pipeline
    trainer: Trainer
    stage: Stage
    source: Path


def reopen(path: Path, overrides: Sequence[str] = (), *, no_plugins: bool = False) -> Reopened:
    """The run's final model; while it has none, its newest good checkpoint. Several processes reopen it together.

    Args:
        path: the run's folder.
        overrides: ``KEY=VALUE`` texts as ``-s`` takes them, laid on the run's configuration for this once.
        no_plugins: use the core's own plugins alone.

    Raises:
        UsageError: it is no run.
        ConfigError: an override makes no sense.
        CheckpointError: it has trained nothing yet, or nothing of it is good.
    """
    folder, loaded, described = open_run(path, overrides)
    config = loaded.config
    registry = Registry.from_environment(config.plugins.allow, config.plugins.deny, no_plugins)
    pipeline = build(loaded, registry, base_dir=Path(described.get("base_dir", ".")))
    trainer = make_trainer(pipeline)
    name, index = first(trainer.processes, lambda: _source(folder, len(pipeline.stages)))
    stage = pipeline.stages[index]
    trainer.begin_stage(stage)
    if name is None:
        trainer.load_parameters(read_model_folder(folder.model).parameters)
        return Reopened(folder, pipeline, trainer, stage, folder.model)
    source = folder.checkpoints / name
    trainer.restore(source / TRAINER)
    return Reopened(folder, pipeline, trainer, stage, source)


def _source(folder: RunFolder, stages: int) -> list[Any]:
    """Name of the checkpoint to read, None for the final model, and the index of its stage."""
    if (folder.model / CONFIG_FILE).is_file():
        return [None, stages - 1]
    found = latest_good(folder.checkpoints)
    if found.path is None:
        refused = "".join(f"; {one.name}: {reason}" for one, reason in found.refused)
        raise CheckpointError(f"{folder.path} has neither a final model nor a good checkpoint yet{refused}")
    return [found.path.name, read_state(found.path).stage_index]
