"""LWM's field language: which fields of a line make an example, in which order, and which of them are learnt.

``[instruction],[vision],answer+source,<|eos|>``: fields stand between commas and are laid end to end; a field in
``[ ]`` is not learnt; ``+`` joins texts; ``<|bos|>`` and ``<|eos|>`` are the tokenizer's own tokens. A name that
contains "vision" holds codes, not text. Spaces around names and signs mean nothing. (LWM's ``data.py``; EasyLM's
``TextProcessor``.)

    fields = field ("," field)*
    field  = "[" part "]" | part
    part   = "<|" ("bos" | "eos") "|>" | name ("+" name)*
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SPECIAL = ("bos", "eos")
_WORD = re.compile(r"[^,\[\]+<>|]*")
_SPECIAL = re.compile(r"<\|([^,\[\]+<>|]*)\|>")
_SPACES = re.compile(r"\s*")


class FieldsError(ValueError):
    """A mistake in a list of fields.

    Args:
        column: where it is, from 1.
        message: what it is, in one line.
    """

    def __init__(self, column: int, message: str) -> None:
        super().__init__(f"column {column}: {message}")
        self.column = column


@dataclass(frozen=True)
class Field:
    """One field.

    Args:
        names: the keys whose texts are joined; one where it holds codes; none where it is a special token.
        special: ``bos`` or ``eos``; empty where it is none of them.
        learnt: whether it is learnt.
    """

    names: tuple[str, ...]
    special: str = ""
    learnt: bool = True

    @property
    def is_vision(self) -> bool:
        """Whether it holds codes."""
        return any("vision" in name for name in self.names)


def parse_fields(spec: str) -> tuple[Field, ...]:
    """The fields of ``spec``.

    Raises:
        FieldsError: with the column of the first mistake.
    """
    parser = _Parser(spec)
    fields = [parser.field()]
    while parser.take(","):
        fields.append(parser.field())
    parser.end()
    if not any(field.learnt for field in fields):
        raise FieldsError(1, "every field stands in [ ], so that nothing is learnt; leave one without")
    return tuple(fields)


def check_fields(spec: str, where: str, prepend_text: str = "") -> tuple[Field, ...]:
    """:func:`parse_fields`, its errors told with the place and the text.

    Raises:
        ValueError: with the column; or a text is to be put before a first field that is none.
    """
    try:
        fields = parse_fields(spec)
    except FieldsError as error:
        raise ValueError(f"{where}: {error} in {spec!r}") from None
    first = next((field for field in fields if field.special != "bos"), fields[0])
    if prepend_text and (first.is_vision or first.special):
        raise ValueError(f"{where}: prepend_text is given, but {spec!r} begins with no text")
    return fields


def choose_fields(specs: Sequence[str], index: int | None, seed: int, where: str, line: int = 0) -> str:
    """One of ``specs``: number ``index``, or a random one that depends on (seed, line) alone.

    Raises:
        ValueError: there is none, or none of that number.
    """
    if not specs:
        raise ValueError(f"{where}: is empty; expected at least one list of fields")
    if index is None:
        index = int(np.random.default_rng((seed % 2**64, line)).integers(len(specs)))
    if index >= len(specs):
        raise ValueError(f"{where}: fields_index is {index}, but there are {len(specs)}, from 0")
    return specs[index]


def format_fields(fields: Sequence[Field]) -> str:
    """What :func:`parse_fields` reads as ``fields``."""
    parts = [f"<|{field.special}|>" if field.special else "+".join(field.names) for field in fields]
    return ",".join(part if field.learnt else f"[{part}]" for field, part in zip(fields, parts, strict=True))


class _Parser:
    """A place in the text, and what is read from there on."""

    def __init__(self, spec: str) -> None:
        self._spec, self._at = spec, 0

    def field(self) -> Field:
        if not self.take("["):
            return self._part(learnt=True)
        open_at = self._at
        field = self._part(learnt=False)
        if not self.take("]"):
            raise self._error(f"got {self._shown()}; expected ']' for the '[' of column {open_at}, or '+'")
        return field

    def take(self, sign: str) -> bool:
        self._skip()
        found = self._spec.startswith(sign, self._at)
        self._at += len(sign) * found
        return found

    def end(self) -> None:
        self._skip()
        if self._at < len(self._spec):
            raise self._error(f"got {self._shown()}; expected ',' or the end")

    def _part(self, learnt: bool) -> Field:
        self._skip()
        special = _SPECIAL.match(self._spec, self._at)
        if special is not None:
            role = special[1].strip()
            if role not in SPECIAL:
                raise self._error(f"got {special[0]!r}; expected <|bos|> or <|eos|>")
            self._at = special.end()
            return Field((), role, learnt)
        at, names = self._at, [self._name()]
        while self.take("+"):
            names.append(self._name())
        field = Field(tuple(names), learnt=learnt)
        if field.is_vision and len(names) > 1:
            self._at = at
            raise self._error("a vision field holds codes and cannot be joined by '+'; put ',' between them")
        return field

    def _name(self) -> str:
        self._skip()
        name = _WORD.match(self._spec, self._at)[0].rstrip()  # type: ignore[index]
        if not name:
            raise self._error(f"got {self._shown()}; expected the name of a field")
        self._at += len(name)
        return name

    def _skip(self) -> None:
        self._at = _SPACES.match(self._spec, self._at).end()  # type: ignore[union-attr]

    def _shown(self) -> str:
        return repr(self._spec[self._at]) if self._at < len(self._spec) else "the end"

    def _error(self, message: str) -> FieldsError:
        return FieldsError(self._at + 1, message)
