"""A plugin's options: its own pydantic model, the validation of a table by it, and its JSON schema.

Tables are a plugin's options alone: the ``name`` beside them in a configuration file belongs to the envelope.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from pydantic import BaseModel, ConfigDict

from lwm_core.errors import PluginError
from lwm_core.registry.select import AUTO, Registry


class NoOptions(BaseModel):
    """What a plugin without an options model takes: nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def plugin_options_model(registry: Registry, kind: str, name: str) -> type[BaseModel]:
    """The pydantic model of a plugin's options; :class:`NoOptions` where it states none.

    Raises:
        PluginError: the plugin cannot be used, or what it names is no pydantic model with ``extra="forbid"`` (a model
            that ignores an unknown key would make a misspelt option silently wrong).
    """
    model = registry.resolve(kind, name, "options")
    if model is None:
        return NoOptions
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise PluginError(f"{kind} {name!r}: its options are {model!r}, expected a pydantic model class")
    if model.model_config.get("extra") != "forbid":
        raise PluginError(f"{kind} {name!r}: its options model {model.__name__} must set extra='forbid'")
    return model


def validate_options(registry: Registry, kind: str, name: str, table: Mapping[str, object]) -> BaseModel:
    """The table as the plugin's own model has it.

    Raises:
        PluginError: as :func:`plugin_options_model`.
        pydantic.ValidationError: as the model raises it, every mistake at once; the caller knows file and line.
    """
    return plugin_options_model(registry, kind, name).model_validate(dict(table))


def options_schema(registry: Registry, kind: str, name: str | None = None) -> dict[str, Any]:
    """JSON schema of a plugin's table with its ``name``, or ``oneOf`` over the plugins of a kind and ``auto``.

    A plugin whose spec or options cannot be imported is left out of the ``oneOf``: one never stops another.
    """
    if name is not None:
        return _table_schema(registry, kind, name, [name])
    candidates = [c for c in registry.candidates(kind) if c.state in ("available", "unusable")]
    branches: list[dict[str, Any]] = [
        {"type": "object", "title": AUTO, "required": ["name"], "properties": {"name": {"const": AUTO}}}
    ]
    definitions: dict[str, Any] = {}
    for candidate in candidates:
        twice = sum(other.name == candidate.name for other in candidates) > 1
        names = [candidate.label] if twice else [candidate.name, candidate.label]
        try:
            branch = _table_schema(registry, kind, candidate.label, names)
        except PluginError:
            continue
        definitions.update(branch.pop("$defs", {}))
        branches.append(branch)
    return {"oneOf": branches, **({"$defs": definitions} if definitions else {})}


def _table_schema(registry: Registry, kind: str, name: str, names: list[str]) -> dict[str, Any]:
    model = plugin_options_model(registry, kind, name)
    # Each plugin's nested models get names of their own, so that many schemas can stand in one document.
    # A ``/`` in a definition's name would need escaping in a JSON pointer; ``:`` and ``.`` need none.
    schema = model.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")
    definitions = {f"{name}.{key}": value for key, value in schema.pop("$defs", {}).items()}
    if "$ref" in schema:  # a model that refers to itself has its own body among the definitions
        schema = dict(definitions[cast(str, schema["$ref"]).removeprefix("#/$defs/")])
    naming = {"const": names[0]} if len(names) == 1 else {"enum": names}
    schema["title"] = names[0]
    schema["description"] = registry.spec(kind, name).summary
    schema["properties"] = {"name": naming, **schema.get("properties", {})}
    schema["required"] = ["name", *schema.get("required", [])]
    return {**schema, **({"$defs": definitions} if definitions else {})}
