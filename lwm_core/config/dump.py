"""Writing a configuration back as TOML."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import date, datetime, time
from typing import Any

from lwm_core.config.document import KeyPath, quote_key

Comment = Callable[[KeyPath], str | None]

_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r", "\b": "\\b", "\f": "\\f"}


def dump_toml(data: Mapping[str, Any], comment: Comment | None = None) -> str:
    """``data`` as TOML that ``tomllib`` reads back to the same values; keys whose value is ``None`` are left out.

    Args:
        data: tables, lists, texts, numbers, booleans, dates and times, nested as they like.
        comment: gives the remark to write after a key or header, or ``None``.

    Raises:
        TypeError: a value has no form in TOML, such as ``None`` in a list.
    """
    lines: list[str] = []
    _table(data, (), lines, comment or (lambda path: None))
    return "\n".join(lines).lstrip("\n") + "\n" if lines else ""


def _table(data: Mapping[str, Any], path: KeyPath, lines: list[str], comment: Comment) -> None:
    """A table's own keys first, for what follows a header belongs to that header."""
    later: list[tuple[str, Any]] = []
    for key, value in data.items():
        if value is None:
            continue
        if isinstance(value, Mapping) or _is_array_of_tables(value):
            later.append((key, value))
        else:
            lines.append(_remark(f"{quote_key(key)} = {_value(value, (*path, key))}", (*path, key), comment))
    for key, value in later:
        below = (*path, key)
        if isinstance(value, Mapping):
            lines += ["", _remark(f"[{_header(below)}]", below, comment)]
            _table(value, below, lines, comment)
            continue
        for index, item in enumerate(value):
            lines += ["", _remark(f"[[{_header(below)}]]", (*below, index), comment)]
            _table(item, (*below, index), lines, comment)


def _header(path: KeyPath) -> str:
    return ".".join(quote_key(part) for part in path if isinstance(part, str))


def _remark(text: str, path: KeyPath, comment: Comment) -> str:
    remark = comment(path)
    return f"{text}  # {' '.join(remark.split())}" if remark else text


def _is_array_of_tables(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _value(value: Any, path: KeyPath) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + "".join(_character(one) for one in value) + '"'
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(float(value)) if math.isfinite(value) else str(float(value))
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(item, (*path, index)) for index, item in enumerate(value)) + "]"
    if isinstance(value, Mapping):
        pairs = [f"{quote_key(key)} = {_value(item, (*path, key))}" for key, item in value.items() if item is not None]
        return "{" + ", ".join(pairs) + "}"
    raise TypeError(f"{'.'.join(map(str, path))}: TOML has no form for {value!r} of type {type(value).__name__}")


def _character(one: str) -> str:
    if one in _ESCAPES:
        return _ESCAPES[one]
    return f"\\u{ord(one):04x}" if ord(one) < 0x20 or ord(one) == 0x7F else one
