"""One plugin by name outside of a run, with its options as ``-s`` gives them: an encoder for ``lwm encode``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from pydantic import ValidationError

from lwm_core.config.document import OVERRIDE, Document, Origin, no_plugin_tables, walk
from lwm_core.config.load import EXTRA
from lwm_core.config.override import apply_overrides
from lwm_core.config.problems import problems_from
from lwm_core.errors import ConfigError
from lwm_core.pipeline.select import Plugged
from lwm_core.registry import Registry, plugin_options_model


def plug(
    kind: str,
    name: str,
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    registry: Registry | None = None,
) -> Plugged:
    """The plugin that ``name`` means, with its options; nothing of it is made yet.

    Args:
        kind: the plugin's kind.
        name: a plugin's name, ``dist:name``, or ``auto``.
        overrides: ``KEY=VALUE`` texts of the plugin's own options, the last winning.
        options: options that the overrides are laid on, such as those that a file was made with.
        registry: the installed plugins; by default under the environment's lists.

    Raises:
        PluginError: the plugin is missing or cannot be used.
        ConfigError: with a line for every mistake in the options.
    """
    if registry is None:
        registry = Registry.from_environment()
    choice = registry.choose(kind, name)
    model = plugin_options_model(registry, kind, choice.candidate.label)
    given = dict(options or {})
    base = Document(OVERRIDE, given, {path: Origin(EXTRA) for path, _ in walk(given) if path})
    document, problems = apply_overrides(base, overrides, no_plugin_tables)
    try:
        validated = model.model_validate(document.data)
    except ValidationError as error:
        owner = f"{choice.candidate.name!r} ({choice.candidate.origin})"
        raise ConfigError([*problems, *problems_from(error, model, document.origins, owner=owner)]) from None
    if problems:
        raise ConfigError(problems)
    return Plugged(kind, name, choice, validated, ())


def make(plugged: Plugged, *context: object, registry: Registry | None = None) -> object:
    """What the plugin's factory gives for its options and ``context``.

    Raises:
        PluginError: its factory cannot be imported.
        LwmError: as the factory raises it.
    """
    if registry is None:
        registry = Registry.from_environment()
    factory = cast(Any, registry.load(plugged.kind, plugged.label))
    return cast(object, factory(plugged.options, *context))
