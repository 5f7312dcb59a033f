"""Reading a source: a TOML or JSON file or a shipped recipe, with everything that it extends."""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from lwm_core.config.document import Document, KeyPath, Origin, Origins, PluginTest, no_plugin_tables, walk
from lwm_core.config.locate import locate_json, locate_toml
from lwm_core.config.merge import merge
from lwm_core.errors import ConfigError, UsageError

_SUFFIXES = (".toml", ".json")
_TOML_PLACE = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")


def recipes_folder() -> Traversable:
    """Where the shipped recipes lie."""
    return files("lwm_core") / "recipes"


def recipe_names() -> list[str]:
    """The names of the shipped recipes, in order."""
    folder = recipes_folder()
    if not folder.is_dir():
        return []
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


@dataclass(frozen=True)
class _Source:
    """A file to read; ``title`` is how messages call it, ``identity`` tells two titles of one file."""

    title: str
    file: Traversable
    identity: str
    folder: str | None  # of a file on disk, as the user wrote it; None for a recipe


def read_source(name_or_path: str | os.PathLike[str], *, plugin_table: PluginTest = no_plugin_tables) -> Document:
    """Read a recipe by its name, or a file by its path (``.toml`` or ``.json``), and merge it on what it extends.

    ``extends = ["base.toml"]`` names files relative to the one it stands in, or recipes; the later wins over the
    earlier, and the file itself over all. The key itself is not part of the result.

    Args:
        plugin_table: tells which tables belong to a plugin, for :func:`~lwm_core.config.merge.merge`.

    Raises:
        UsageError: there is no such file or recipe.
        ConfigError: a file is not valid, or extends something that is missing or extends it in turn.
    """
    return _read(_find(os.fspath(name_or_path), None), (), plugin_table)


def _find(name: str, base: _Source | None) -> _Source:
    """The source that ``name`` means, seen from ``base``."""
    if name.endswith(_SUFFIXES):
        if base is not None and base.folder is None:
            return _recipe(name.removesuffix(".toml"))
        path = Path(base.folder or ".", name) if base is not None else Path(name)
        if not path.is_file():
            what = "is a folder, not a file" if path.is_dir() else "no such file"
            raise UsageError(f"{path}: {what}; expected a .toml or .json file, or a recipe ({_known()})")
        return _Source(str(path), path, str(path.resolve()), str(path.parent))
    if name in recipe_names():
        return _recipe(name)
    if os.sep in name or "." in name or Path(name).is_file():
        raise UsageError(f"{name}: a configuration is a .toml or .json file, or one of the recipes: {_known()}")
    near = difflib.get_close_matches(name, recipe_names(), 1)
    hint = f"; did you mean {near[0]}?" if near else ";"
    raise UsageError(f"{name!r} is not a recipe{hint} known recipes: {_known()}; a file's name ends in .toml")


def _recipe(name: str) -> _Source:
    if name not in recipe_names():
        raise UsageError(f"{name!r} is not a recipe; known recipes: {_known()}")
    return _Source(f"recipe {name}", recipes_folder() / f"{name}.toml", f"recipe {name}", None)


def _known() -> str:
    return ", ".join(recipe_names()) or "none"


def _read(source: _Source, chain: tuple[_Source, ...], plugin_table: PluginTest) -> Document:
    document = _parse(source)
    extends = document.data.pop("extends", [])
    places = {path: place for path, place in document.origins.items() if path[:1] == ("extends",)}
    origins = {path: place for path, place in document.origins.items() if path not in places}
    document = Document(document.name, document.data, origins)
    if not isinstance(extends, list) or not all(isinstance(name, str) for name in extends):
        raise ConfigError(f'{places["extends",]}: extends: expected a list of files or recipes, such as ["base.toml"]')
    base = Document(source.title, {}, {})
    chain = (*chain, source)
    for index, name in enumerate(extends):
        place = places["extends", index]
        try:
            found = _find(name, source)
        except UsageError as error:
            raise ConfigError(f"{place}: extends: {error}") from None
        if found.identity in [earlier.identity for earlier in chain]:
            titles = " -> ".join(one.title for one in (*chain, found))
            raise ConfigError(f"{place}: extends: the files extend each other in a circle: {titles}")
        base = merge(base, _read(found, chain, plugin_table), plugin_table)
    return merge(base, document, plugin_table) if extends else document


def _parse(source: _Source) -> Document:
    try:
        text = source.file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source.title}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise UsageError(f"{source.title}: cannot be read: {error.strerror or error}") from None
    try:
        if source.file.name.endswith(".json"):
            data = json.loads(text, object_pairs_hook=_unique_keys)
            lines = locate_json(text)
        else:
            data = tomllib.loads(text)
            lines = locate_toml(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_toml_problem(source.title, text, str(error))) from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source.title}:{error.lineno}: {error.msg} (column {error.colno})") from None
    except _RepeatedKeyError as error:
        raise ConfigError(f"{source.title}: key {str(error)!r} is given twice in one object") from None
    except RecursionError:
        raise ConfigError(f"{source.title}: nested too deeply to read") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{source.title}: expected an object of keys, got a {type(data).__name__}")
    return Document(source.title, data, _origins(source.title, data, lines))


def _origins(title: str, data: dict[str, Any], lines: dict[KeyPath, int]) -> Origins:
    return {path: Origin(title, lines[path] if path else None) for path, _ in walk(data)}


def _toml_problem(title: str, text: str, message: str) -> str:
    place = _TOML_PLACE.search(message)
    if place is None:
        return f"{title}: {message}"
    line, column = place.group(1), place.group(2)
    where = f"{title}:{line or max(1, len(text.splitlines()))}"
    return f"{where}: {message[: place.start()]} ({f'column {column}' if column else 'at the end of the file'})"


class _RepeatedKeyError(Exception):
    """A JSON object gives one key twice."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _RepeatedKeyError(key)
        result[key] = value
    return result
