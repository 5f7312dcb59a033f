"""The key locators: every key of tomllib's result, on the line where the text has it."""

from __future__ import annotations

import json
import tomllib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lwm_core.config.document import KeyPath, walk
from lwm_core.config.locate import locate_json, locate_toml

KEYS = st.one_of(st.sampled_from(["a", "b", "name", "0", "-1", "true"]), st.text(max_size=4))
TEXTS = st.one_of(
    st.sampled_from(["# no", '"', "'", '"""', "'''", "]", "}", "[[x]]", "a = 1", "\\", 'x\n"y"\n', "'a'\n\n''b"]),
    st.text(st.characters(codec="utf-8"), max_size=8),
)
SCALARS = st.one_of(TEXTS, st.integers(-999, 999), st.booleans(), st.floats(allow_nan=False))
VALUES = st.recursive(
    SCALARS, lambda at: st.one_of(st.lists(at, max_size=3), st.dictionaries(KEYS, at, max_size=3)), max_leaves=9
)
DOCUMENTS = st.dictionaries(KEYS, VALUES, max_size=5)
FILLERS = ["", "\n", "# [no] 'comment\"\n", "  \t\n\n"]


def _escaped(text: str, keep_newlines: bool = False) -> str:
    plain = "".join(f"\\U{ord(c):08x}" if ord(c) < 32 or ord(c) in (34, 92, 127) else c for c in text)
    return plain.replace("\\U0000000a", "\n") if keep_newlines else plain


class Writer:
    """Writes a document as TOML in styles that Hypothesis draws, and notes the line on which it puts each key."""

    def __init__(self, data: st.DataObject) -> None:
        self.draw = data.draw
        self.text = ""
        self.lines: dict[KeyPath, int] = {}

    def choose(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def mark(self, path: KeyPath) -> None:
        self.lines.setdefault(path, self.text.count("\n") + 1)

    def space(self) -> str:
        return self.choose("", " ", "\t ")

    def gap(self) -> None:
        """What may stand between the items of an array."""
        self.text += self.space() + self.choose("", "\n", '# , ] "\n')

    def key(self, key: str) -> str:
        forms = ['"' + _escaped(key) + '"']
        if key and key.isascii() and all(c.isalnum() or c in "-_" for c in key):
            forms.append(key)
        if all(c.isprintable() and c != "'" for c in key):
            forms.append(f"'{key}'")
        return self.choose(*forms)

    def string(self, text: str) -> str:
        forms = [f'"{_escaped(text)}"', f'"""\n{_escaped(text, True)}"""', f'"""\\\n   {_escaped(text)}"""']
        if not text or text[0].isspace():
            forms.pop()  # a backslash at the end of a line swallows the blanks that follow
        if "\r" not in text and all(c.isprintable() or c == "\n" for c in text):
            if "'''" not in text and not text.endswith("'"):
                forms.append(f"'''\n{text}'''")
            if "\n" not in text and "'" not in text:
                forms.append(f"'{text}'")
        if text.endswith('"') and not text.endswith('""'):
            forms.append(f'"""\n{_escaped(text[:-1], True)}""""')  # a quote before the closing three
        return self.choose(*forms)

    def inline(self, value: Any, path: KeyPath) -> None:
        if isinstance(value, list):
            self.text += "["
            for index, item in enumerate(value):
                self.gap()
                self.mark((*path, index))
                self.inline(item, (*path, index))
                self.gap()
                self.text += "," if index < len(value) - 1 else self.choose("", ",")
            self.gap()
            self.text += "]"
        elif isinstance(value, dict):
            self.text += "{" + self.space()
            for index, (key, item) in enumerate(value.items()):
                self.text += ", " if index else ""
                self.pair(key, item, path)
            self.text += self.space() + "}"
        elif isinstance(value, str):
            self.text += self.string(value)
        else:
            self.text += str(value).lower()

    def pair(self, key: str, value: Any, path: KeyPath) -> None:
        written = self.key(key)
        self.mark((*path, key))
        path = (*path, key)
        while isinstance(value, dict) and len(value) == 1 and self.choose(True, False):
            ((inner, value),) = value.items()
            path = (*path, inner)
            written += self.space() + "." + self.space() + self.key(inner)
            self.mark(path)
        self.text += written + self.space() + "=" + self.space()
        self.inline(value, path)

    def table(self, table: dict[str, Any], path: KeyPath, header: list[str]) -> None:
        later = []
        for key, value in table.items():
            is_tables = isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
            if (isinstance(value, dict) or is_tables) and self.choose(True, False):
                later.append((key, value))
                continue
            self.text += self.choose(*FILLERS) + self.space()
            self.pair(key, value, path)
            self.text += self.space() + self.choose("", "# [x] = '") + "\n"
        for key, value in later:
            below = (*path, key)
            names = [*header, self.key(key)]
            for index, item in enumerate(value) if isinstance(value, list) else [(None, value)]:
                self.text += self.choose(*FILLERS) + self.space()
                start, end = ("[", "]") if index is None else ("[[", "]]")
                self.mark(below)
                here = below if index is None else (*below, index)
                self.mark(here)
                self.text += f"{start}{self.space()}{(self.space() + '.').join(names)}{self.space()}{end}\n"
                self.table(item, here, names)


@settings(max_examples=300, deadline=None)
@given(DOCUMENTS, st.data(), st.booleans())
def test_every_key_has_its_line(document: dict[str, Any], data: st.DataObject, crlf: bool) -> None:
    writer = Writer(data)
    writer.table(document, (), [])
    text = writer.text.replace("\n", "\r\n") if crlf else writer.text
    assert tomllib.loads(text) == document  # the writer is right
    lines = locate_toml(text)
    assert set(lines) == {path for path, _ in walk(document) if path}
    assert lines == writer.lines


def test_the_forms_of_a_configuration() -> None:
    text = """\
# a comment with = and [brackets]
extends = [
  "base.toml",  # first
  'other.toml',
]
[attention]   # the plugin
name = "jax-ring"
kernel.block."q size" = 512
note = \"\"\"
[not.a.header]
x = 1 \\\"\"\" and so on\"\"\"
[[stages]]
seq_len = 1
[stages.mix]
text = 1.0
[[stages]]
mix = { text = 0.5, "needle=x" = 0.5 }
date = 1979-05-27 07:32:00
[data.deep]
"""
    lines = locate_toml(text)
    assert set(lines) == {path for path, _ in walk(tomllib.loads(text)) if path}
    assert lines["extends", 0] == 3 and lines["extends", 1] == 4
    assert lines["attention",] == 6
    assert lines["attention", "kernel", "block", "q size"] == 8
    assert lines["stages",] == 12 and lines["stages", 0] == 12 and lines["stages", 0, "mix", "text"] == 15
    assert lines["stages", 1, "mix", "needle=x"] == 17
    assert lines["stages", 1, "date"] == 18
    assert lines["data",] == 19


def test_a_header_of_its_own_beats_an_implied_table() -> None:
    lines = locate_toml("[a.b]\nx = 1\n[a]\ny = 2\n")
    assert lines["a",] == 3 and lines["a", "b"] == 1


@settings(max_examples=100, deadline=None)
@given(DOCUMENTS, st.sampled_from([None, 2]))
def test_json_keys_have_their_lines(document: dict[str, Any], indent: int | None) -> None:
    text = json.dumps(document, indent=indent)
    lines = locate_json(text)
    assert set(lines) == {path for path, _ in walk(document) if path}
    for path, line in lines.items():
        if isinstance(path[-1], str):
            assert json.dumps(path[-1]) + ":" in text.splitlines()[line - 1]
    if indent:  # one line a key or item, in the order of the document
        ordered = [lines[path] for path, _ in walk(document) if path]
        assert ordered == sorted(set(ordered))


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment", "a = 1", "\r\n[a]\r\nb = 2"])
def test_small_texts(text: str) -> None:
    assert set(locate_toml(text)) == {path for path, _ in walk(tomllib.loads(text)) if path}
