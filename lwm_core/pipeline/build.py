"""From the chosen plugins to tokenizer, model and stages, and to the makers of trainer, data and suites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lwm_core.config.document import KeyPath, origin_of
from lwm_core.config.envelope import StageTable
from lwm_core.config.load import LoadedConfig
from lwm_core.errors import ConfigError, LwmError, PluginError
from lwm_core.mesh import data_ranks, resolve_mesh
from lwm_core.model import ModelConfig, preset
from lwm_core.pipeline.select import Plugged, Problems, Selection, check_options
from lwm_core.protocols import (
    AttentionFactory,
    ContextSchedule,
    DataContext,
    DataSource,
    EncoderContext,
    EvalSuite,
    OptimizerSpec,
    Stage,
    StartModel,
    Tokenizer,
    TokenizerContext,
    Trainer,
    TrainerContext,
    VisionEncoder,
)
from lwm_core.registry import Registry
from lwm_core.registry.select import Select
from lwm_core.rope import RopeSpec
from lwm_core.shards import Settings
from lwm_core.vocab import Vocabulary
from lwm_core.weights import ModelFolder, read_model_folder

_VOCABULARY = ("text_size", "vision_size")
"""Keys of ``[model]`` that are the vocabulary's."""

BASE = "base"
"""The name under which the starting model is evaluated; no stage may take it."""


@dataclass(frozen=True)
class Pipeline:
    """A run's parts, those that cost something made only when asked for.

    Args:
        loaded: the configuration.
        registry: where the plugins come from.
        selection: the plugins with their options.
        tokenizer: text to ids and back.
        start: the model begun from; its length and RoPE where it was trained before.
        weights: its parameters; none for random ones.
        stages: the schedule.
        base_dir: where relative paths start.
    """

    loaded: LoadedConfig
    registry: Registry
    selection: Selection
    tokenizer: Tokenizer
    start: StartModel
    weights: ModelFolder | None
    stages: tuple[Stage, ...]
    base_dir: Path

    @property
    def model(self) -> ModelConfig:
        """The model that is trained."""
        return self.start.model

    def make_trainer(self) -> Trainer:
        """The trainer with its own fresh parameters."""
        config = self.loaded.config
        context = TrainerContext(
            model=self.model,
            attention=self._attention_factory(),
            attention_options=self.selection.attention.options,
            optimizer=OptimizerSpec(**config.optimizer.model_dump()),
            loss_weights=config.loss.model_dump(),
            seed=config.seed,
        )
        return cast(Trainer, self._call(self.selection.trainer, context))

    def make_data(self) -> DataSource:
        """The data source."""
        context = DataContext(self.tokenizer, self.model.vocabulary, self.loaded.config.seed, self.base_dir)
        return cast(DataSource, self._call(self.selection.data, context))

    def make_encoder(self) -> VisionEncoder | None:
        """The vision encoder, in the trainer's framework where it knows that; none where none is named.

        Raises:
            ConfigError: the model has no ids for its codes.
        """
        plugged = self.selection.encoder
        if plugged is None:
            return None
        context = EncoderContext(self.selection.trainer.choice.spec.framework, self.base_dir)
        encoder = cast(VisionEncoder, self._call(plugged, context))
        vocabulary = self.model.vocabulary
        has = vocabulary.vision_codes if vocabulary.vision_size else 0
        if encoder.codes > has:
            problems = Problems(self.loaded)
            problems.add(
                plugged.path,
                f"encoder {plugged.name!r} has {encoder.codes} codes, but the model has ids for {has}; "
                "set model.vision_size to what the codes and two delimiters need (LWM: 8448)",
            )
            problems.raise_if_any()
        return encoder

    def make_suites(self) -> dict[str, EvalSuite]:
        """The evaluation suites by the name of their files; a plugin that is named twice is numbered."""
        return {key: cast(EvalSuite, self._call(plugged)) for key, plugged in self.suites_plugged().items()}

    def suites_plugged(self) -> dict[str, Plugged]:
        """The plugins of the suites, by the same names as :meth:`make_suites` has."""
        found: dict[str, Plugged] = {}
        for plugged in self.selection.evals:
            key, number = plugged.name, 2
            while key in found:
                key, number = f"{plugged.name}-{number}", number + 1
            found[key] = plugged
        return found

    def check_codes(self, encoder: VisionEncoder, trained: Mapping[str, Settings]) -> None:
        """Hold the codes that are trained on against the encoder that is named.

        Args:
            encoder: what :meth:`make_encoder` gave.
            trained: data source → how its codes were made.

        Raises:
            ConfigError: some are of other weights, and would mean other pictures to it.
        """
        plugged = cast(Plugged, self.selection.encoder)
        problems = Problems(self.loaded)
        for name, made in trained.items():
            if made.checksum != encoder.checksum:
                problems.add(
                    plugged.path,
                    f"encoder {plugged.name!r} has the weights {encoder.checksum[:12]}, but the codes of data source "
                    f"{name!r} were made by {made.encoder} with {made.checksum[:12]}; name that encoder and its "
                    "options here, or encode the source again",
                )
        problems.raise_if_any()

    def base_stage(self) -> Stage:
        """The starting model's own length and RoPE on the first stage's mesh, to evaluate it before any training."""
        first = self.stages[0]
        seq_len = self.start.seq_len or first.seq_len
        return Stage(
            name=BASE, seq_len=seq_len, rope=self.start.rope or first.rope, tokens=first.rows * seq_len,
            batch_tokens=first.rows * seq_len, lr=first.lr, min_lr=first.min_lr, accumulate=first.accumulate,
            mesh=first.mesh, mix=first.mix,
        )  # fmt: skip

    def check_stages(self, device_count: int | None, hint: str | None = None) -> None:
        """Hold every stage's mesh, length and rows against the devices, before anything is trained or written.

        Args:
            device_count: devices that the trainer has; where it does not say, it refuses a mesh at the stage's start.
            hint: how the trainer is given others, told with a mesh that does not fit.

        Raises:
            ConfigError: with a line for every stage that does not fit.
        """
        if device_count is None:
            return
        problems = Problems(self.loaded)
        factory = self._attention_factory()
        for index, stage in enumerate(self.stages):
            path: KeyPath = ("context",) if self.selection.context is not None else ("stages", index)
            try:
                sizes = resolve_mesh(stage.mesh, device_count)
            except (LwmError, ValueError) as error:
                more = f"; {hint}" if hint else ""
                problems.add((*path, "mesh"), f"stage {stage.name!r}: {error}{more}")
                continue
            try:
                factory.layout(self.selection.attention.options, stage.seq_len, sizes["sp"])
            except LwmError as error:
                problems.add((*path, "seq_len"), f"stage {stage.name!r}: {error}")
            ranks = data_ranks(sizes)
            if (stage.rows // stage.accumulate) % ranks:
                problems.add(
                    (*path, "batch_tokens"),
                    f"stage {stage.name!r}: {stage.rows} rows a step in {stage.accumulate} micro-batches do not divide "
                    f"over dp × fsdp = {ranks}; change batch_tokens, accumulate or mesh",
                )
        problems.raise_if_any()

    def _attention_factory(self) -> AttentionFactory:
        return cast(AttentionFactory, self.registry.load("attention", self.selection.attention.label))

    def _call(self, plugged: Plugged, *context: object) -> object:
        factory = cast(Any, self.registry.load(plugged.kind, plugged.label))
        with self.placed(plugged):
            return cast(object, factory(plugged.options, *context))

    @contextmanager
    def placed(self, plugged: Plugged) -> Iterator[None]:
        """What a plugin finds wrong with its files or its device is told with the place that asked for it."""
        try:
            yield
        except ConfigError:
            raise
        except LwmError as error:
            place = origin_of(self.loaded.origins, plugged.path)
            error.args = (f"{place}: {error}" if place is not None else str(error),)
            raise


def build(
    loaded: LoadedConfig, registry: Registry, *, select: Select | None = None, base_dir: Path = Path(".")
) -> Pipeline:
    """Find the plugins, check their options, and build tokenizer, model and stages.

    Raises:
        PluginError: a plugin is missing or cannot be used.
        ConfigError: with a line for every mistake.
        CheckpointError: the model to start from is damaged.
        DataError: the tokenizer's files are missing or wrong.
    """
    selection = check_options(loaded, registry, select=select, base_dir=base_dir)
    weights = None if selection.weights is None else read_model_folder(selection.weights.folder)
    maker = cast(Any, registry.load("tokenizer", selection.tokenizer.label))
    tokenizer: Tokenizer = maker(selection.tokenizer.options, TokenizerContext(selection.weights, base_dir))
    problems = Problems(loaded)
    start = _start_model(loaded, tokenizer, weights, problems)
    problems.raise_if_any()
    stages = _stages(loaded, registry, selection, start, problems)
    problems.raise_if_any()
    return Pipeline(loaded, registry, selection, tokenizer, start, weights, stages, base_dir)


def _start_model(
    loaded: LoadedConfig, tokenizer: Tokenizer, weights: ModelFolder | None, problems: Problems
) -> StartModel:
    table = loaded.config.model
    shape = table.model_dump(exclude={"preset", *_VOCABULARY})
    if weights is not None:
        _check_agreement(loaded, tokenizer, weights.model, problems)
        return StartModel(weights.model, weights.seq_len, weights.rope)
    text_size = tokenizer.size if table.text_size is None else table.text_size
    if tokenizer.size > text_size:
        problems.add(
            ("model", "text_size"), f"text_size = {text_size} is fewer than the {tokenizer.size} ids of the tokenizer; "
            "leave it out to take as many"
        )  # fmt: skip
        problems.raise_if_any()
    try:
        vocabulary = Vocabulary(text_size, table.vision_size or 0)
        return StartModel(preset(table.preset, vocabulary, **shape))
    except LwmError as error:
        problems.add(("model",), error)
        problems.raise_if_any()
        raise


def _check_agreement(loaded: LoadedConfig, tokenizer: Tokenizer, model: ModelConfig, problems: Problems) -> None:
    """The model comes from its folder; what the configuration says of it besides must be so."""
    init = loaded.config.init
    text_size = model.vocabulary.text_size
    if tokenizer.size > text_size:
        problems.add(
            ("tokenizer",), f"the tokenizer has {tokenizer.size} ids, but {init!r} has rows for {text_size}; "
            "leave [tokenizer] out to use its own"
        )  # fmt: skip
    given: dict[str, Any] = dict(loaded.data.get("model", {}))
    name = given.pop("preset", None)
    if name is not None:
        shape = {key: value for key, value in given.items() if key not in _VOCABULARY}
        try:
            wanted = preset(name, model.vocabulary, **shape)
        except LwmError as error:
            problems.add(("model",), error)
            return
        fields = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
                  "tie_embeddings")  # fmt: skip
        given = {**{field: getattr(wanted, field) for field in fields}, **given}
    for key, value in given.items():
        has = getattr(model.vocabulary if key in _VOCABULARY else model, key)
        if value != has:
            where: KeyPath = ("model", key) if key in loaded.data["model"] else ("model", "preset")
            problems.add(where, f"{key} = {value}, but {init!r} has {has}; leave [model] out to take its shape")


def _stages(
    loaded: LoadedConfig, registry: Registry, selection: Selection, start: StartModel, problems: Problems
) -> tuple[Stage, ...]:
    path: KeyPath = ("stages",)
    if selection.context is None:
        stages = [_literal(table) for table in loaded.config.stages]
    else:
        path = ("context",)
        schedule = cast(ContextSchedule, registry.load("context", selection.context.label))
        try:
            stages = list(schedule(selection.context.options, start))
        except (LwmError, ValueError) as error:
            problems.add(path, error)
            return ()
        if not stages:
            raise PluginError(f"context {selection.context.name!r} gives no stage; expected at least one")
    return tuple(_named(stages, path, problems))


def _literal(table: StageTable) -> Stage:
    return Stage(
        name=table.name or str(table.seq_len),
        seq_len=table.seq_len,
        rope=RopeSpec(table.theta),
        tokens=table.tokens,
        batch_tokens=table.batch_tokens,
        lr=table.lr,
        min_lr=0.1 * table.lr if table.min_lr is None else table.min_lr,
        lr_schedule=table.lr_schedule,
        warmup_steps=table.warmup_steps,
        accumulate=table.accumulate,
        mesh=table.mesh,
        mix=table.mix,
    )


def _named(stages: Sequence[Stage], path: KeyPath, problems: Problems) -> list[Stage]:
    """The stages, each with a name of its own, for metrics, evaluations and reports are keyed by it."""
    seen: dict[str, int] = {}
    for index, stage in enumerate(stages):
        at = (*path, index, "name") if path == ("stages",) else path
        if stage.name == BASE:
            problems.add(at, f"a stage cannot be called {BASE!r}: that is the starting model")
        if stage.name in seen:
            problems.add(at, f"stages {seen[stage.name] + 1} and {index + 1} are both called {stage.name!r}; name them")
        seen[stage.name] = index
    return list(stages)


def trainer_facts(trainer: Trainer) -> tuple[Mapping[str, Any], int | None, float | None]:
    """What :meth:`Trainer.describe` says, and of it ``device_count`` and ``peak_flops`` (of all devices together)."""
    facts = trainer.describe()
    count, peak = facts.get("device_count"), facts.get("peak_flops")
    return facts, None if count is None else int(count), None if peak is None else float(peak)
