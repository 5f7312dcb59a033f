"""The second pass over a configuration: which plugin each table means, and its options by that plugin's own model.

Every mistake is told at once, with file and line; plugins that are known but not installed become one line that names
all there is to install.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

from pydantic import BaseModel, ValidationError

from lwm_core.config.document import KeyPath, dotted, origin_of
from lwm_core.config.envelope import PluginTable
from lwm_core.config.load import LoadedConfig
from lwm_core.config.problems import problems_from
from lwm_core.errors import ConfigError, LwmError, PluginError, UsageError
from lwm_core.model import PRESETS
from lwm_core.protocols import WeightsBundle
from lwm_core.registry import AUTO, KNOWN, Choice, Registry, plugin_options_model
from lwm_core.registry.select import Select
from lwm_core.weights import CONFIG_FILE, read_model_config

RANDOM = "random"
DEFAULT_TRAINER = "lwm-jax-ring"  # what to install where 'auto' finds no trainer at all; it brings an attention too
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class Plugged:
    """A table of the configuration with the plugin it means.

    Args:
        kind: the plugin's kind.
        asked: the name in the configuration, which may be ``auto``.
        choice: what was chosen and why each other was not.
        options: the table's options as the plugin's own model has them.
        path: where in the configuration the table stands.
    """

    kind: str
    asked: str
    choice: Choice
    options: BaseModel
    path: KeyPath

    @property
    def name(self) -> str:
        """The plugin's name."""
        return self.choice.candidate.name

    @property
    def label(self) -> str:
        """``dist:name``, which always resolves."""
        return self.choice.candidate.label

    @property
    def needs_encoder(self) -> bool:
        """Whether its spec says that a vision encoder must be there for it (an eval's may)."""
        return self.choice.spec.capability("encoder") is True


@dataclass(frozen=True)
class Selection:
    """The plugins of a run, and the folder of the model that it starts from (none: random parameters)."""

    tokenizer: Plugged
    trainer: Plugged
    attention: Plugged
    encoder: Plugged | None
    context: Plugged | None
    data: Plugged
    evals: tuple[Plugged, ...]
    weights: WeightsBundle | None
    weights_plugin: Choice | None

    @property
    def plugged(self) -> tuple[Plugged, ...]:
        """All of them."""
        asked = tuple(one for one in (self.encoder, self.context) if one is not None)
        return (self.tokenizer, self.trainer, self.attention, *asked, self.data, *self.evals)


class Problems:
    """Mistakes gathered while a configuration is checked."""

    def __init__(self, loaded: LoadedConfig) -> None:
        self.loaded = loaded
        self.lines: list[str] = []
        self.missing: list[str] = []

    def add(self, path: KeyPath, message: object) -> None:
        """Note what is wrong with the key at ``path``; a message of several lines gives several."""
        place = origin_of(self.loaded.origins, path)
        where = f"{place}: " if place is not None else ""
        # What an override set is named by the override itself.
        key = "" if place is not None and place.text.partition("=")[0].strip() == dotted(path) else f"{dotted(path)}: "
        self.lines += [f"{where}{key}{line}" for line in str(message).splitlines()]

    def raise_if_any(self) -> None:
        """Raise one error with all that was found."""
        if self.missing:
            what = self.loaded.source.removeprefix("recipe ")
            dists = " ".join(dict.fromkeys(self.missing))
            install = f"{what} needs plugins that are not installed: pip install {dists}"
            if not self.lines:
                raise PluginError(install)
            self.lines.append(install)
        if self.lines:
            self._raise()

    def _raise(self) -> NoReturn:
        raise ConfigError(list(dict.fromkeys(self.lines)))


def check_options(
    loaded: LoadedConfig, registry: Registry | None = None, *, select: Select | None = None, base_dir: Path = Path(".")
) -> Selection:
    """Find every plugin that the configuration names and validate its options.

    Args:
        registry: the installed plugins; by default under the configuration's and the environment's lists.
        select: a veto over choices (``lwm_select``).
        base_dir: where relative paths start.

    Raises:
        PluginError: all that is wrong is that plugins are not installed; the line names every one of them.
        ConfigError: with a line for every mistake.
    """
    config = loaded.config
    if registry is None:
        registry = Registry.from_environment(config.plugins.allow, config.plugins.deny)
    problems = Problems(loaded)
    check = _Check(loaded, registry, select, problems)
    weights, weights_plugin = check.weights(base_dir)
    tokenizer = check.plug("tokenizer", _tokenizer_table(loaded, weights), ("tokenizer",))
    trainer = check.plug("trainer", config.trainer, ("trainer",), {"framework": check.framework_of(config.attention)})
    wanted = {"masks": "causal", **check.shape(weights)}
    if trainer is not None:
        wanted["framework"] = trainer.choice.spec.framework
    attention = check.plug("attention", config.attention, ("attention",), wanted)
    encoder = None
    if config.encoder is not None:
        # NumPy is all that passes between them, so a named one may be of another framework; 'auto' brings no second.
        follow = wanted.get("framework") if config.encoder.name == AUTO else None
        encoder = check.plug("encoder", config.encoder, ("encoder",), {"framework": follow} if follow else None)
    context = None if config.context is None else check.plug("context", config.context, ("context",))
    data = check.plug("data", config.data, ("data",))
    evals = [check.plug("eval", table, ("evals", index)) for index, table in enumerate(config.evals)]
    for plugged in evals:
        if plugged is not None and plugged.needs_encoder and config.encoder is None:
            problems.add(
                (*plugged.path, "name"),
                f'eval {plugged.name!r} needs a vision encoder, and none is named; write encoder = {{ name = "auto" }}',
            )
    problems.raise_if_any()
    return Selection(
        cast(Plugged, tokenizer), cast(Plugged, trainer), cast(Plugged, attention), encoder, context,
        cast(Plugged, data), tuple(cast("list[Plugged]", evals)), weights, weights_plugin,
    )  # fmt: skip


def _tokenizer_table(loaded: LoadedConfig, weights: WeightsBundle | None) -> PluginTable:
    """The tokenizer that is named; else the one that the starting model came with."""
    if "tokenizer" in loaded.data or weights is None:
        return loaded.config.tokenizer
    return PluginTable(name="hf" if (weights.folder / TOKENIZER_FILE).is_file() else "bytes")


class _Check:
    """Finds and validates plugins one at a time; what is wrong goes to ``problems``."""

    def __init__(self, loaded: LoadedConfig, registry: Registry, select: Select | None, problems: Problems) -> None:
        self._loaded = loaded
        self._registry = registry
        self._select = select
        self._problems = problems

    def plug(
        self, kind: str, table: PluginTable, path: KeyPath, wanted: Mapping[str, object] | None = None
    ) -> Plugged | None:
        choice = self._choose(kind, table.name, (*path, "name"), wanted)
        if choice is None:
            return None
        label = choice.candidate.label
        try:
            model = plugin_options_model(self._registry, kind, label)
            options = model.model_validate(table.options)
        except ValidationError as error:
            owner = f"{choice.candidate.name!r} ({choice.candidate.origin})"
            self._problems.lines += problems_from(error, model, self._loaded.origins, path, owner)
            return None
        except LwmError as error:
            self._problems.add((*path, "name"), error)
            return None
        return Plugged(kind, table.name, choice, options, path)

    def framework_of(self, attention: PluginTable) -> str | None:
        """The framework of a named attention, which a trainer chosen by ``auto`` must share."""
        if attention.name == AUTO or self._loaded.config.trainer.name != AUTO:
            return None
        try:
            return self._registry.spec("attention", attention.name).framework
        except LwmError:
            return None  # told when the attention itself is looked at

    def shape(self, weights: WeightsBundle | None) -> dict[str, object]:
        """What the model's heads ask of an attention, as far as it can be told before the tokenizer is known."""
        if weights is not None:
            try:
                model = read_model_config(weights.folder)[0]
            except LwmError as error:
                self._problems.add(("init",), error)
                return {}
            return {"gqa": model.num_kv_heads < model.num_heads, "head_dim": model.head_dim}
        table = self._loaded.config.model
        if table.preset not in PRESETS:
            known = ", ".join(PRESETS)
            self._problems.add(("model", "preset"), f"unknown preset {table.preset!r}; expected one of {known}")
            return {}
        values: dict[str, Any] = {
            **PRESETS[table.preset], **table.model_dump(exclude_none=True, exclude={"preset"})
        }  # fmt: skip
        return {"gqa": values["num_kv_heads"] < values["num_heads"], "head_dim": values["head_dim"]}

    def weights(self, base_dir: Path) -> tuple[WeightsBundle | None, Choice | None]:
        """The folder that ``init`` means: a path, or what a weights plugin gives."""
        init = self._loaded.config.init
        if init == RANDOM:
            return None, None
        if "/" in init or "\\" in init or init.startswith((".", "~")):
            folder = base_dir / Path(init).expanduser()
            if not (folder / CONFIG_FILE).is_file():
                self._problems.add(("init",), f"{folder} is not a model folder: there is no {CONFIG_FILE} in it")
                return None, None
            return WeightsBundle(folder.name, folder), None
        choice = self._choose("weights", init, ("init",), None)
        if choice is None:
            return None, None
        try:
            bundle = cast(Any, self._registry.load("weights", choice.candidate.label))()
        except LwmError as error:
            self._problems.add(("init",), error)
            return None, None
        return cast(WeightsBundle, bundle), choice

    def _choose(self, kind: str, name: str, path: KeyPath, wanted: Mapping[str, object] | None) -> Choice | None:
        try:
            return self._registry.choose(kind, name, wanted, select=self._select)
        except (PluginError, UsageError, NotImplementedError) as error:
            present = [c for c in self._registry.candidates(kind) if name in (AUTO, c.name, c.label)]
            if not present and (kind, name) in KNOWN:
                self._problems.missing.append(KNOWN[kind, name])
            elif not present and name == AUTO and kind in ("trainer", "attention"):
                self._problems.missing.append(DEFAULT_TRAINER)
            else:
                self._problems.add(path, error)
            return None
