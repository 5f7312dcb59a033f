"""From a source to a validated :class:`~lwm_core.config.envelope.RunConfig`, or every mistake at once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from lwm_core.config.document import Document, KeyPath, Origin, Origins, PluginTest, walk
from lwm_core.config.envelope import PluginTable, RunConfig
from lwm_core.config.fields import models_at
from lwm_core.config.interpolate import interpolate
from lwm_core.config.merge import merge
from lwm_core.config.override import apply_overrides
from lwm_core.config.problems import problems_from
from lwm_core.config.read import read_source
from lwm_core.errors import ConfigError

EXTRA = "given by the command"


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration that the envelope accepts; the plugins' own options are yet to be checked.

    Args:
        config: the envelope with its defaults.
        data: the same as plain values, only what was given, references resolved.
        origins: where each value of ``data`` comes from.
        notes: lines people should see, such as the options that another plugin's name dropped.
        source: the file or recipe as messages call it.
    """

    config: RunConfig
    data: dict[str, Any]
    origins: Origins
    notes: tuple[str, ...]
    source: str


def plugin_tables(model: type[BaseModel]) -> PluginTest:
    """The test for which paths the annotations of ``model`` give to a plugin's table."""

    def is_plugin_table(path: KeyPath) -> bool:
        return any(issubclass(one, PluginTable) for one in models_at(model, path))

    return is_plugin_table


def load_config(
    source: str | os.PathLike[str], overrides: Sequence[str] = (), extra: Mapping[str, Any] | None = None
) -> LoadedConfig:
    """Read, merge, override, resolve references and validate.

    Args:
        source: a ``.toml`` or ``.json`` file, or the name of a shipped recipe.
        overrides: ``KEY=VALUE`` texts as ``-s`` takes them, the last winning.
        extra: nested values that the command itself sets over all, such as ``{"run": {"out": "runs/a"}}``.

    Raises:
        UsageError: there is no such source.
        ConfigError: with a line for every mistake.
    """
    is_plugin_table = plugin_tables(RunConfig)
    document = read_source(source, plugin_table=is_plugin_table)
    document, problems = apply_overrides(document, overrides, is_plugin_table)
    if extra:
        values = dict(extra)
        given = Document(document.name, values, {path: Origin(EXTRA) for path, _ in walk(values) if path})
        document = merge(document, given, is_plugin_table)
    document, failed, unresolved = interpolate(document)
    problems += failed
    try:
        config = RunConfig.model_validate(document.data)
    except ValidationError as error:
        problems += problems_from(error, RunConfig, document.origins, skip=unresolved)
    if problems:
        raise ConfigError(problems)
    return LoadedConfig(config, document.data, document.origins, document.notes, document.name)
