"""pydantic's validation errors as lines for people: where, which key, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from lwm_core.config.document import OVERRIDE, KeyPath, Origin, Origins, dotted, origin_of
from lwm_core.config.fields import field_at, fields_of, models_at, nested_models

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError
    from pydantic_core import ErrorDetails

_MOST_LISTED = 16  # keys named in one message
_LONGEST_VALUE = 60  # characters of a value shown

# What each kind of pydantic error expects; the kinds ending in _type and _parsing are found by their beginning.
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text",
    "list": "a list",
    "tuple": "a list",
    "set": "a list",
    "dict": "a table",
    "model": "a table",
    "model_attributes": "a table",
    "mapping": "a table",
    "none_required": "no value",
    "date": "a date",
    "datetime": "a date and time",
    "time": "a time",
    "path": "a path",
}
_LIMITS = {
    "greater_than": "a number greater than {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number less than {lt}",
    "less_than_equal": "a number of at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "finite_number": "a finite number",
    "string_pattern_mismatch": "a text that matches {pattern}",
    "string_too_short": "a text of at least {min_length} characters",
    "string_too_long": "a text of at most {max_length} characters",
    "too_short": "at least {min_length} items",
    "too_long": "at most {max_length} items",
    "literal_error": "{expected}",
    "enum": "{expected}",
}


@dataclass(frozen=True)
class _Finding:
    """One thing that is wrong. ``expected`` is empty where ``message`` says all."""

    path: KeyPath
    expected: str = ""
    got: Any = None
    message: str = ""
    branch: bool = False  # one of several alternatives for the value


def problems_from(
    error: ValidationError,
    model: type[BaseModel],
    origins: Origins,
    prefix: KeyPath = (),
    owner: str | None = None,
    skip: Collection[KeyPath] = (),
) -> list[str]:
    """One line for each mistake in ``error``, in the order in which they stand in the files.

    Args:
        error: what ``model.model_validate`` raised.
        model: the model, for near misses and descriptions.
        origins: where each key of the whole document comes from.
        prefix: where in the document the validated table stands: ``("attention",)`` for a plugin's options.
        owner: for a plugin's options, whose they are: ``"'jax-ring' (lwm-jax-ring 1.2)"``.
        skip: keys of the validated table whose mistakes are told elsewhere.
    """
    lines: dict[str, Origin | None] = {}
    told = [one for one in error.errors(include_url=False) if not any(one["loc"][: len(key)] == key for key in skip)]
    for finding in _joined([_finding(one, model, origins, prefix, owner) for one in told]):
        place = origin_of(origins, (*prefix, *finding.path))
        lines.setdefault(_line(finding, place, (*prefix, *finding.path)), place)
    order = {source: rank for rank, source in enumerate(dict.fromkeys(one.source for one in origins.values()))}
    return sorted(lines, key=lambda line: _rank(lines[line], order))


def _rank(place: Origin | None, order: Mapping[str, int]) -> tuple[int, int]:
    if place is None:
        return len(order), 0
    return len(order) if place.source == OVERRIDE else order[place.source], place.line or 0


def _line(finding: _Finding, place: Origin | None, path: KeyPath) -> str:
    message = finding.message
    if finding.expected:
        message = f"expected {finding.expected}, got {_shown(finding.got)}"
    key = dotted(path)
    if place is not None and place.text.partition("=")[0].strip() == key:
        key = ""  # the override names the key itself
    return ": ".join(part for part in (str(place) if place else "", key, message) if part)


def _finding(
    error: ErrorDetails, model: type[BaseModel], origins: Origins, prefix: KeyPath, owner: str | None
) -> _Finding:
    kind = error["type"]
    path, branch = _path(error["loc"], model, origins, prefix, last_is_key=kind in ("missing", "extra_forbidden"))
    if kind == "extra_forbidden":
        return _Finding(path, message=_unknown(path, _tagged(models_at(model, path[:-1]), error), model, prefix, owner))
    if kind == "missing":
        info = field_at(model, path)
        about = f" ({info.description})" if info is not None and info.description else ""
        return _Finding(path, message=f"missing{about}; add {dotted(path[-1:])} = ...")
    expected = _expected(error)
    if expected:
        return _Finding(path, expected=expected, got=error["input"], branch=branch)
    message = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return _Finding(_blamed(path, message, origins, prefix), message="; ".join(message.splitlines()))


def _path(
    location: tuple[int | str, ...], model: type[BaseModel], origins: Origins, prefix: KeyPath, *, last_is_key: bool
) -> tuple[KeyPath, bool]:
    """The key path in a pydantic location, which also names the alternatives of unions; whether it named any.

    An alternative may be called like a key of its neighbour (``kind = "text"`` beside a key ``text``), so every reading
    is tried: the one that leaves out least is taken, and of those one that stands in the document. The table of a
    missing or unknown key (``last_is_key``) does stand there.
    """
    readings: list[tuple[int, KeyPath]] = [(0, ())]
    for position, part in enumerate(location):
        is_last = position == len(location) - 1
        longer: list[tuple[int, KeyPath]] = []
        for left_out, path in readings:
            below = (*path, part)
            if (*prefix, *below) in origins or field_at(model, below) is not None or (is_last and last_is_key):
                longer.append((left_out, below))
            longer.append((left_out + 1, path))
        readings = longer
    last = location[-1:]

    def stands(path: KeyPath) -> bool:
        return any(key[: len(prefix) + len(path)] == (*prefix, *path) for key in origins)

    def rank(reading: tuple[int, KeyPath]) -> tuple[bool, int, bool, bool, int]:
        left_out, path = reading
        homeless = last_is_key and not stands(path[:-1])
        return homeless, left_out, (*prefix, *path) not in origins, path[-1:] != last, -len(path)

    left_out, path = min(readings, key=rank)
    return path, left_out > 0


def _tagged(models: list[type[BaseModel]], error: ErrorDetails) -> list[type[BaseModel]]:
    """Of a tagged union's models those that the location's tag names; of anything else all."""
    tag = error["loc"][-2] if len(error["loc"]) > 1 else None
    meant = [one for one in models if any(tag in get_args(info.annotation) for info in fields_of(one).values())]
    return meant or models


def _blamed(path: KeyPath, message: str, origins: Origins, prefix: KeyPath) -> KeyPath:
    """A table's own check that begins with one of its keys (``"tokens = 5 is ..."``) is about that key."""
    first = message.split(maxsplit=1)[0].rstrip(":") if message.strip() else ""
    return (*path, first) if (*prefix, *path, first) in origins else path


def _expected(error: ErrorDetails) -> str:
    kind = error["type"]
    context = error.get("ctx", {})
    if kind in _LIMITS:
        return _LIMITS[kind].format(**context)
    if kind == "int_from_float":
        return _KINDS["int"]
    for ending in ("_type", "_parsing", "_unicode"):
        if kind.removesuffix(ending) in _KINDS:
            return _KINDS[kind.removesuffix(ending)]
    if error["msg"].startswith("Input should be "):
        return error["msg"].removeprefix("Input should be ")
    return ""


def _joined(findings: list[_Finding]) -> Iterator[_Finding]:
    """Findings with those about one value's alternatives told as one: ``expected a text or a list``."""
    seen: set[KeyPath] = set()
    for finding in findings:
        path = finding.path
        if not finding.branch or not finding.expected:
            yield finding
        elif path not in seen:
            seen.add(path)
            same = [one for one in findings if one.path == path and one.expected and one.branch]
            # A mistake further in is about the alternative that was meant.
            if not any(len(one.path) > len(path) and one.path[: len(path)] == path for one in findings):
                yield _Finding(path, " or ".join(dict.fromkeys(one.expected for one in same)), finding.got)


def _unknown(
    path: KeyPath, allowed: list[type[BaseModel]], model: type[BaseModel], prefix: KeyPath, owner: str | None
) -> str:
    key = str(path[-1])
    what = f"unknown option of {owner}" if owner else "unknown key"
    known = list(dict.fromkeys(name for one in allowed for name in fields_of(one)))
    near = difflib.get_close_matches(key.lower().replace("-", "_"), known, 1)
    if near:
        return f"{what}; did you mean {near[0]}?"
    elsewhere = [f"{table}.{key}" for table, one in nested_models(model) if key in fields_of(one)]
    if elsewhere:
        return f"{what} here; did you mean {dotted((*prefix,))}{'.' if prefix else ''}{' or '.join(elsewhere)}?"
    if not known:
        return f"{what}; there are none here"
    return f"{what}; known: {', '.join(known[:_MOST_LISTED])}{', ...' if len(known) > _MOST_LISTED else ''}"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, bool):
        return str(value).lower()
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."
