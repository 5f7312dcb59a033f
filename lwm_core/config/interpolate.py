"""``${train.seq_len}`` and ``${env:HOME}`` as whole values: the value of another key, or of the environment.

There are no expressions, and no references inside a longer text. ``$${`` writes a literal ``${``.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lwm_core.config.document import Document, KeyPath, dotted, origin_of, walk

_REFERENCE = re.compile(r"\$\{([^{}]*)\}")
_UNESCAPED = re.compile(r"(?<!\$)\$\{")


class _UnresolvedError(Exception):
    """A reference without a value; ``path`` is the key that holds it."""

    def __init__(self, path: KeyPath, message: str) -> None:
        super().__init__(message)
        self.path = path


def interpolate(
    document: Document, environ: Mapping[str, str] = os.environ
) -> tuple[Document, list[str], set[KeyPath]]:
    """``document`` with every reference replaced by its value.

    A key refers to what the files and overrides give, not to the defaults of models. Values from the environment
    are text; models turn them into numbers where they expect some. A value keeps the origin of its reference.

    Returns:
        the document; one line for each reference that has no value; and the keys that are left without one.
    """
    resolver = _Resolver(document.data, environ)
    origins = dict(document.origins)
    problems: dict[str, None] = {}
    unresolved: set[KeyPath] = set()

    def fill(value: Any, path: KeyPath) -> Any:
        if isinstance(value, dict):
            return {key: fill(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [fill(item, (*path, index)) for index, item in enumerate(value)]
        if not isinstance(value, str):
            return value
        try:
            resolved = resolver.value(path)
        except _UnresolvedError as error:
            problems[f"{origin_of(origins, error.path)}: {dotted(error.path)}: {error}"] = None
            unresolved.add(path)
            return value
        for below, _ in walk(resolved, path):
            origins.setdefault(below, origins[path])
        return resolved

    data = fill(document.data, ())
    return Document(document.name, data, origins, document.notes), list(problems), unresolved


class _Resolver:
    def __init__(self, data: dict[str, Any], environ: Mapping[str, str]) -> None:
        self._data = data
        self._environ = environ
        self._open: list[KeyPath] = []  # the keys whose values are being worked out, outermost first

    def value(self, parts: Sequence[str | int]) -> Any:
        """The value at a key, itself and all below it free of references.

        Raises:
            LookupError: there is no such key.
            _UnresolvedError: a reference on the way or below has no value.
        """
        node: Any = self._data
        path: KeyPath = ()
        free = False  # whether a reference was followed, behind which there are no more
        for part in parts:
            if isinstance(node, str) and not free:
                node, free = self._text(node, path), True
            node, key = _child(node, part)
            path = (*path, key)
        return node if free else self._whole(node, path)

    def _whole(self, node: Any, path: KeyPath) -> Any:
        if isinstance(node, str):
            return self._text(node, path)
        if not isinstance(node, dict | list):
            return node
        with self._opened(path):
            if isinstance(node, dict):
                return {key: self._whole(item, (*path, key)) for key, item in node.items()}
            return [self._whole(item, (*path, index)) for index, item in enumerate(node)]

    def _text(self, text: str, path: KeyPath) -> Any:
        match = _REFERENCE.fullmatch(text)
        if match is not None:
            with self._opened(path):
                return self._referred(match.group(1), path)
        if _UNESCAPED.search(text):
            hint = "a reference is a whole value; write $${ for a literal ${"
            raise _UnresolvedError(path, f"{text!r} mixes ${{ with other text; {hint}")
        return text.replace("$${", "${")

    def _referred(self, name: str, path: KeyPath) -> Any:
        if name.startswith("env:"):
            variable = name.removeprefix("env:")
            if variable not in self._environ:
                raise _UnresolvedError(path, f"environment variable {variable!r} is not set; export it first")
            return self._environ[variable]
        try:
            return self.value(_parse_reference(name))
        except ValueError:
            message = f"${{{name}}} is not a reference; expected ${{a.b}} or ${{env:NAME}}, without expressions"
        except LookupError:
            known = [dotted(key) for key, _ in walk(self._data) if key and key != path]
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean ${{{near[0]}}}?" if near else "only keys that are written out can be referred to"
            message = f"${{{name}}} refers to a key that is not set; {hint}"
        raise _UnresolvedError(path, message)

    @contextmanager
    def _opened(self, path: KeyPath) -> Iterator[None]:
        if path in self._open:
            circle = [dotted(key) for key in self._open[self._open.index(path) :]]
            first = circle.index(min(circle))  # the same line, whichever key of the circle it is met from
            circle = circle[first:] + circle[: first + 1]
            at = self._open[self._open.index(path) + first]
            raise _UnresolvedError(at, f"refers to itself: {' -> '.join(circle)}")
        self._open.append(path)
        try:
            yield
        finally:
            self._open.pop()


def _child(node: Any, part: str | int) -> tuple[Any, str | int]:
    if isinstance(node, dict):
        return node[part], part
    if isinstance(node, list) and str(part).isdecimal():
        return node[int(part)], int(part)
    raise LookupError(part)


def _parse_reference(name: str) -> list[str]:
    """``a."b c".0`` → its parts; a ``ValueError`` where it is not a dotted key."""
    if "=" in name or "\n" in name or "#" in name:
        raise ValueError(name)
    node = tomllib.loads(f"{name} = 0")
    parts: list[str] = []
    while isinstance(node, dict):
        (part,) = node
        parts.append(part)
        node = node[part]
    return parts
