"""``-s a.b=c``: single values laid on a document from the command line, the last one winning."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from typing import Any

from lwm_core.config.document import OVERRIDE, Document, KeyPath, Origin, Origins, PluginTest, dotted, walk
from lwm_core.config.merge import Merger

_KEY_PART = re.compile(r'[A-Za-z0-9_-]+|"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'')
_KEY = re.compile(rf"\s*((?:{_KEY_PART.pattern})(?:\s*\.\s*(?:{_KEY_PART.pattern}))*)\s*=")
_OPENINGS = ("[", "{", '"', "'")


def parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    """Read ``a.b=c`` into its key and value.

    The value is a TOML literal; a word that is none (``lr=fast``, ``out=runs/x``) is a string.

    Raises:
        ValueError: there is no ``=``, no key, no value, or a bracket or quote is left open.
    """
    match = _KEY.match(text)
    if match is None:
        raise ValueError("expected KEY=VALUE with a dotted key, such as optimizer.clip_norm=0.5")
    try:
        parts = [key for part in _KEY_PART.findall(match.group(1)) for key in tomllib.loads(f"{part} = 0")]
    except tomllib.TOMLDecodeError:
        raise ValueError(f"{match.group(1)} is not a TOML key") from None
    return tuple(parts), _literal(text[match.end() :].strip())


def _literal(text: str) -> Any:
    if not text:
        raise ValueError('there is no value after =; write "" for an empty text')
    try:
        # Inside an inline table a newline, a comment or a second pair cannot slip in beside the value.
        parsed = tomllib.loads(f"v = {{v = {text}}}")
        if list(parsed) == ["v"] and list(parsed["v"]) == ["v"]:
            return parsed["v"]["v"]
    except (tomllib.TOMLDecodeError, RecursionError):
        pass
    if text.startswith(_OPENINGS):
        raise ValueError(f"{text} is not a TOML value; close its brackets and quote the texts in it")
    return text


def apply_overrides(
    document: Document, overrides: Sequence[str], plugin_table: PluginTest
) -> tuple[Document, list[str]]:
    """``document`` with each ``KEY=VALUE`` laid on it in order, and one line for each that could not be.

    A part of a key that is a number addresses an item of a list that is there: ``stages.0.tokens=100``. Naming
    another plugin drops the options that files gave, never those that other overrides give.
    """
    merger = Merger(document, plugin_table)
    problems = []
    for text in overrides:
        try:
            parts, value = parse_override(text)
            _apply(merger, merger.data, (), parts, value, Origin(OVERRIDE, text=text))
        except ValueError as error:
            problems.append(f"{OVERRIDE} {text}: {error}")
    return merger.document(document.name), problems


def _apply(merger: Merger, node: Any, path: KeyPath, parts: Sequence[str], value: Any, origin: Origin) -> None:
    head, rest = parts[0], parts[1:]
    key: str | int = _item(node, path, head) if isinstance(node, list) else head
    here = (*path, key)
    known = isinstance(key, int) or key in node
    if not rest or not known:
        for part in reversed(rest):
            value = {part: value}
        origins: Origins = {below: origin for below, _ in walk(value, here)}
        if isinstance(key, int):
            merger.put(node, key, value, here, origins)
        else:
            merger.table(node, {key: value}, path, origins)
    elif isinstance(node[key], dict | list):
        _apply(merger, node[key], here, rest, value, origin)
    else:
        raise ValueError(f"{dotted(here)} is {node[key]!r} and has no keys of its own")


def _item(node: list[Any], path: KeyPath, part: str) -> int:
    if part.isdecimal() and int(part) < len(node):
        return int(part)
    have = f"items 0 to {len(node) - 1}" if node else "no items"
    raise ValueError(f"{dotted(path)} is a list with {have}, got {part!r}; a longer list is set as a whole")
