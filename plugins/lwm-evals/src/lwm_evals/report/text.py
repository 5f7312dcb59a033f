"""Numbers and values as the page writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from lwm_evals.figures import tokens
from lwm_evals.report.collect import number

DASH = "–"


def count(value: object) -> str:
    """``1234567`` → ``1,234,567``."""
    found = number(value)
    return f"{found:,.0f}" if math.isfinite(found) else DASH


def short(value: object) -> str:
    """``1234567`` → ``1.23M``; contexts as people name them (``4096`` → ``4K``)."""
    found = number(value)
    return tokens(found) if math.isfinite(found) else DASH


def percent(value: object) -> str:
    """``0.987`` → ``98.7%``."""
    found = number(value)
    return f"{found:.1%}".replace(".0%", "%") if math.isfinite(found) else DASH


def duration(value: object) -> str:
    """Seconds in the two units that matter: ``0.21 s``, ``5 min 12 s``, ``3 h 4 min``, ``2 d 5 h``."""
    seconds = number(value)
    if not math.isfinite(seconds):
        return DASH
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    for size, unit, below, under in ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size} {unit}" + (f" {rest} {under}" if rest else "")
    raise AssertionError("60 s and more were handled above")


def plain(value: object) -> str:
    """Any value of a JSON file in one line."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and 1e4 <= abs(value) < 1e12 else f"{value:g}"
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    return json.dumps(value, ensure_ascii=False)


def flatten(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Nested tables as (dotted key, value in one line); a list of tables has its positions in brackets."""
    return list(_walk(value, path))


def _walk(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and (value or not path):
        for key, item in value.items():
            yield from _walk(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        for i, item in enumerate(value):
            yield from _walk(item, f"{path}[{i}]")
    else:
        yield path, json.dumps(value, ensure_ascii=False) if isinstance(value, (list, Mapping)) else plain(value)


def shorten(value: str, most: int = 420) -> str:
    """A long text's start and end; a short one as it is."""
    if len(value) <= most:
        return value
    left = value[: most * 2 // 3].rstrip()
    right = value[-most // 3 :].lstrip()
    return f"{left} […] {right}"
