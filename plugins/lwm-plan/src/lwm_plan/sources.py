"""Where a plan's job and stages come from: a recipe or file, or the folder of a Llama that is to be extended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lwm_core.errors import UsageError
from lwm_core.protocols import Stage
from lwm_core.rope import RopeSpec, first_base_violation
from lwm_core.rope_scalings import base_bound_theta
from lwm_plan.job import Job

CONFIG = "config.json"
TOKENS, BATCH_TOKENS, RATE = 1_000_000_000, 4_194_304, 2e-5
"""Of an extension in one step, as UltraLong's (1B tokens) and LWM's (4M a batch)."""


@dataclass(frozen=True)
class Source:
    """What is planned.

    Args:
        name: in words.
        job: model, trainer and attention.
        stages: the schedule.
        free: the meshes are the planner's to choose.
        notes: on how the source was read.
        literal: stages are in the recipe itself, so that ``-s stages.0.mesh=…`` reaches them.
        make_trainer: makes the recipe's trainer, which loads its framework; none for a folder.
    """

    name: str
    job: Job
    stages: tuple[Stage, ...]
    free: bool = False
    notes: tuple[str, ...] = ()
    literal: bool = True
    make_trainer: Callable[[], object] | None = None


def read_source(
    name: str, overrides: Sequence[str], to: int | None, tokens: int | None, batch_tokens: int | None
) -> Source:
    """A recipe, a file, or with ``to`` the folder of a model.

    Raises:
        UsageError: an option does not belong to what is planned.
        ConfigError, PluginError: the recipe is wrong, or a plugin that it names is missing.
        CheckpointError: the folder's ``config.json`` is not a Llama's.
    """
    folder = Path(name)
    if folder.is_dir():
        if overrides:
            raise UsageError(f"-s {overrides[0]}: {name} is a model's folder, which has no keys to set; leave -s out")
        return _of_folder(folder, to, tokens or TOKENS, batch_tokens)
    given = {"--to": to, "--tokens": tokens, "--batch-tokens": batch_tokens}
    for option, value in given.items():
        if value is not None:
            raise UsageError(
                f"{option} belongs to a model's folder, but {name!r} is none; a recipe says it in [[stages]]"
            )
    return _of_recipe(name, overrides)


def _of_recipe(name: str, overrides: Sequence[str]) -> Source:
    from lwm_core.config import load_config
    from lwm_core.pipeline import build
    from lwm_core.registry import Registry

    loaded = load_config(name, overrides)
    config = loaded.config
    pipeline = build(loaded, Registry.from_environment(config.plugins.allow, config.plugins.deny))
    trainer, attention = pipeline.selection.trainer, pipeline.selection.attention
    job = Job.from_options(pipeline.model, trainer.name, trainer.options, attention.options)
    return Source(
        loaded.source, job, pipeline.stages, notes=tuple(loaded.notes), literal=config.context is None,
        make_trainer=pipeline.make_trainer,
    )  # fmt: skip


def _of_folder(folder: Path, to: int | None, tokens: int, batch_tokens: int | None) -> Source:
    from lwm_core.weights import read_model_config

    model, rope, trained = read_model_config(folder)
    if to is None:
        raise UsageError(
            f"{folder}: --to is missing; say how many tokens its context is to reach, such as --to 1048576"
        )
    if to < 1:
        raise UsageError(f"--to is {to}; expected a positive number of tokens")
    batch = batch_tokens or max(to, BATCH_TOKENS // to * to)
    if batch < to or batch % to or tokens < 1:
        raise UsageError(
            f"--batch-tokens {batch}, --tokens {tokens}: expected positive tokens, and a batch of whole rows of {to}"
        )
    theta = _theta(max(rope.theta, base_bound_theta(to)), model.head_dim, to)
    stage = Stage(
        name=f"to {to}", seq_len=to, rope=RopeSpec(theta), tokens=tokens, batch_tokens=batch, lr=RATE, min_lr=RATE,
        mesh="1,-1,1,1",
    )  # fmt: skip
    note = (
        f"from {trained} tokens with theta {rope.theta:g} to {to} in one stage with theta {theta:.3g}, which keeps the "
        f"bound on the base; {tokens} tokens, {batch} a batch"
    )
    return Source(str(folder), Job(model), (stage,), free=True, notes=(note,))


def _theta(least: float, head_dim: int, seq_len: int) -> float:
    """The first of ``least`` · 2^(k/4) that keeps the bound on the base; ``least`` where none of few does."""
    tried = [least * 2 ** (k / 4) for k in range(9)]
    return next((one for one in tried if first_base_violation(RopeSpec(one), head_dim, seq_len) is None), least)
