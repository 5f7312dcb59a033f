"""What has been read: plain values, and for each key the place that gave it.

A key path is a tuple of table keys (``str``) and list positions (``int``): ``("stages", 0, "seq_len")``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

KeyPath = tuple[str | int, ...]
PluginTest = Callable[[KeyPath], bool]

OVERRIDE = "-s"
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+\Z")


@dataclass(frozen=True, slots=True)
class Origin:
    """Who gave a value.

    Args:
        source: the file as the user wrote it, ``recipe NAME``, or ``-s``.
        line: the line in that file, from 1; ``None`` for the file as a whole and for ``-s``.
        text: for ``-s``, the override as typed.
    """

    source: str
    line: int | None = None
    text: str = ""

    def __str__(self) -> str:
        if self.text:
            return f"{self.source} {self.text}"
        return self.source if self.line is None else f"{self.source}:{self.line}"


Origins = dict[KeyPath, Origin]


@dataclass(frozen=True)
class Document:
    """The values of one source with all that it extends, before any model has seen them.

    ``origins`` has an entry for every table, list, list item and value, and for the root ``()``.
    ``notes`` are lines that people should see, such as options that were dropped.
    """

    name: str
    data: dict[str, Any]
    origins: Origins
    notes: tuple[str, ...] = field(default=())


def quote_key(key: str) -> str:
    """``key`` as TOML writes it: bare where that is allowed, else in quotes."""
    return key if _BARE_KEY.match(key) else json.dumps(key, ensure_ascii=False).replace("\x7f", "\\u007f")


def dotted(path: KeyPath) -> str:
    """``("stages", 0, "seq_len")`` → ``stages.0.seq_len``, the way ``-s`` takes it."""
    return ".".join(quote_key(part) if isinstance(part, str) else str(part) for part in path)


def walk(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every path at and below ``path`` with its value, parents first."""
    yield path, value
    if isinstance(value, dict):
        for key, item in value.items():
            yield from walk(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from walk(item, (*path, index))


def leaves(value: Any) -> Iterator[tuple[KeyPath, Any]]:
    """The paths that hold no further keys: scalars, and tables and lists that are empty."""
    return ((path, item) for path, item in walk(value) if not (isinstance(item, dict | list) and item))


def origin_of(origins: Origins, path: KeyPath) -> Origin | None:
    """The origin of ``path`` or of the nearest table around it."""
    for length in range(len(path), -1, -1):
        if path[:length] in origins:
            return origins[path[:length]]
    return None


def no_plugin_tables(path: KeyPath) -> bool:
    """The test for documents without a model: no table belongs to a plugin."""
    return False
