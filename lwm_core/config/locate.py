"""On which line each key of a TOML or JSON text stands.

``tomllib`` and ``json`` give values without positions. The locators here read a text that those have already
accepted, so they only follow its structure and never judge it.
"""

from __future__ import annotations

import json
import re
import tomllib
from bisect import bisect_right

from lwm_core.config.document import KeyPath

_BLANK = re.compile(r"[ \t]*")
_BLANK_LINES = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_BARE_VALUE = re.compile(r"[^,\]}#\n]*")
# The long forms come first; a long string may end in up to two quotes of its own before the closing three.
_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?""""{0,2}' r"|'''.*?''''{0,2}" r'|"(?:[^"\\]|\\.)*"' r"|'[^']*'",
    re.DOTALL,
)
_JSON_TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+)')


def locate_toml(text: str) -> dict[KeyPath, int]:
    """The line, from 1, of every table, list, list item and value of a text that ``tomllib`` accepts.

    A table stands where its header is, or where it is first named when it has none (``[a.b]`` names ``a``).
    """
    return _TomlLocator(text).lines


def locate_json(text: str) -> dict[KeyPath, int]:
    """The line, from 1, of every object, array, item and value of a text that ``json`` accepts."""
    return _JsonLocator(text).lines


class _Text:
    """A text, a position in it, and the lines found so far."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.lines: dict[KeyPath, int] = {}
        self._starts = [0, *(match.end() for match in re.finditer("\n", text))]

    def line(self) -> int:
        return bisect_right(self._starts, self.position)

    def take(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.position)
        if match is None:  # the text was accepted before, so this is our mistake and not the user's
            raise AssertionError(f"the key locator lost its way at line {self.line()}")
        self.position = match.end()
        return match.group()

    def peek(self) -> str:
        return self.text[self.position : self.position + 1]


class _TomlLocator(_Text):
    def __init__(self, text: str) -> None:
        super().__init__(text.replace("\r\n", "\n"))
        self._items: dict[KeyPath, int] = {}  # tables so far in each array of tables
        table: KeyPath = ()
        self.take(_BLANK_LINES)
        while self.peek():
            if self.peek() == "[":
                table = self._header()
            else:
                self._pair(table)
            self.take(_BLANK_LINES)

    def _header(self) -> KeyPath:
        line = self.line()
        double = self.text.startswith("[[", self.position)
        self.position += 2 if double else 1
        keys = self._keys()
        self.position += 2 if double else 1
        path: KeyPath = ()
        for key in keys[:-1]:
            path = (*path, key)
            self.lines.setdefault(path, line)
            if path in self._items:  # [stages.mix] goes on with the newest of [[stages]]
                path = (*path, self._items[path] - 1)
        path = (*path, keys[-1])
        if not double:
            self.lines[path] = line
            return path
        self.lines.setdefault(path, line)
        count = self._items.get(path, 0)
        self._items[path] = count + 1
        self.lines[*path, count] = line
        return (*path, count)

    def _pair(self, table: KeyPath) -> None:
        line = self.line()
        path = table
        for key in self._keys():
            path = (*path, key)
            self.lines.setdefault(path, line)
        self.position += 1  # "="
        self.take(_BLANK)
        self._value(path)

    def _keys(self) -> list[str]:
        keys: list[str] = []
        while True:
            self.take(_BLANK)
            if self.peek() in ('"', "'"):
                # tomllib itself undoes the escapes, so that the two cannot differ
                keys.extend(tomllib.loads(self.take(_STRING) + " = 0"))
            else:
                keys.append(self.take(_BARE_KEY))
            self.take(_BLANK)
            if self.peek() != ".":
                return keys
            self.position += 1

    def _value(self, path: KeyPath) -> None:
        opening = self.peek()
        if opening in ('"', "'"):
            self.take(_STRING)
        elif opening == "[":
            self._array(path)
        elif opening == "{":
            self._inline_table(path)
        else:
            self.take(_BARE_VALUE)

    def _array(self, path: KeyPath) -> None:
        self.position += 1
        index = 0
        self.take(_BLANK_LINES)
        while self.peek() != "]":
            self.lines[*path, index] = self.line()
            self._value((*path, index))
            index += 1
            self._comma()
        self.position += 1

    def _inline_table(self, path: KeyPath) -> None:
        self.position += 1
        self.take(_BLANK_LINES)
        while self.peek() != "}":
            self._pair(path)
            self._comma()
        self.position += 1

    def _comma(self) -> None:
        self.take(_BLANK_LINES)
        if self.peek() == ",":
            self.position += 1
            self.take(_BLANK_LINES)


class _JsonLocator(_Text):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._value((), self._token())

    def _token(self) -> str:
        return self.take(_JSON_TOKEN).strip()

    def _value(self, path: KeyPath, token: str) -> None:
        if path:
            self.lines.setdefault(path, self.line())
        if token == "{":
            while (token := self._token()) != "}":
                if token != ",":
                    key = json.loads(token)
                    self.lines[*path, key] = self.line()
                    self._token()  # ":"
                    self._value((*path, key), self._token())
        elif token == "[":
            index = 0
            while (token := self._token()) != "]":
                if token != ",":
                    self._value((*path, index), token)
                    index += 1
