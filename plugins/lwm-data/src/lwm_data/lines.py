"""Lines of a .jsonl in LWM's field language: where they lie, and the tokens of each.

A line's fields, its prompt and what of it is learnt are the line's own; see :mod:`lwm_data.field_language`.

Shapes: L lines; T frames of n codes; N tokens of a line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lwm_core.batch import TokenSequence
from lwm_core.errors import DataError, ShapeError
from lwm_core.frames import VISION_END, VISION_START, frame_tokens, uniform_frames
from lwm_core.protocols import Tokenizer
from lwm_core.vocab import Vocabulary
from lwm_data.field_language import Field, check_fields, choose_fields
from lwm_data.options import JsonlOptions
from lwm_data.read import PACKED, find_files, reason_of
from lwm_data.sources.base import example

FIELDS_KEY = "fields"
"""Where a line says itself which of its fields make the example."""


def line_files(options: JsonlOptions, base: Path, name: str) -> list[Path]:
    """The files of a jsonl source.

    Raises:
        DataError: there is none, or one is packed.
    """
    who = f"jsonl source {name!r}"
    files = find_files(options.path, base, who, (".jsonl",))
    packed = next((file for file in files if file.suffix in PACKED), None)
    if packed is not None:
        raise DataError(f"{who}: {packed} is packed, but lines are read at any place; unpack it first")
    return files


class LineReader:
    """A line to tokens: a pure function of (seed, line)."""

    def __init__(self, options: JsonlOptions, tokenizer: Tokenizer, vocabulary: Vocabulary, seed: int) -> None:
        self._options, self._vocabulary, self._seed = options, vocabulary, seed
        self._encode = tokenizer.encode
        self._start, self._end = (tokenizer.encode(text) for text in (VISION_START, VISION_END))
        self._special = dict(tokenizer.special_ids)

    def sequence(self, raw: bytes, line: int, place: str) -> TokenSequence:
        """The example of a line.

        Args:
            raw: the line as it stands there.
            line: its number from 1.
            place: ``file:line``, which errors begin with.

        Raises:
            DataError: it is not JSON, its fields are wrong or missing, or nothing of it is learnt.
        """
        try:
            record = json.loads(raw)
        except ValueError as error:
            raise DataError(f"{place}: is not JSON: {reason_of(error)}") from None
        if not isinstance(record, dict):
            raise DataError(f"{place}: holds a {type(record).__name__}; expected an object with the example's fields")
        try:
            parts = list(self._parts(record, self._fields(record, line)))
        except ValueError as error:  # ShapeError among them
            raise DataError(f"{place}: {error}") from None
        ids = np.concatenate([np.asarray(part, np.int32) for part, _ in parts])
        learnt = np.concatenate([np.full(len(part), is_learnt) for part, is_learnt in parts])
        if not learnt[1:].any():
            raise DataError(f"{place}: nothing of it is learnt; the fields outside [ ] are empty")
        return example(ids, learnt, self._options.share)

    def _fields(self, record: dict[str, Any], line: int) -> tuple[Field, ...]:
        specs: object = self._options.fields
        if specs is None:
            specs = record.get(FIELDS_KEY)
        listed = [specs] if isinstance(specs, str) else specs
        if not isinstance(listed, Sequence) or not all(isinstance(spec, str) for spec in listed):
            got = "no 'fields'" if specs is None else f"'fields' of {type(specs).__name__}"
            raise ValueError(f"has {got}; expected a string such as '[instruction],[vision],answer', or several")
        spec = choose_fields(listed, self._options.fields_index, self._seed, FIELDS_KEY, line)
        return check_fields(spec, FIELDS_KEY, self._options.prepend_text)

    def _parts(self, record: dict[str, Any], fields: Sequence[Field]) -> Iterator[tuple[Sequence[int] | Any, bool]]:
        """Ids and whether they are learnt; bos and eos are added where the fields do not begin or end with them."""
        if self._options.bos and fields[0].special != "bos" and "bos" in self._special:
            yield [self._special["bos"]], False
        before = self._options.prepend_text
        for field in fields:
            if field.special:
                if field.special not in self._special:
                    raise ValueError(f"fields: the tokenizer has no {field.special}; leave <|{field.special}|> out")
                yield [self._special[field.special]], field.learnt
            elif field.is_vision:
                yield self._start, field.learnt
                yield self._clip(field.names[0], _value(record, field.names[0])), field.learnt
                yield self._end, field.learnt
            else:
                yield self._encode(before + self._text(record, field)), field.learnt
                before = ""
        if self._options.eos and fields[-1].special != "eos" and "eos" in self._special:
            yield [self._special["eos"]], True

    def _text(self, record: dict[str, Any], field: Field) -> str:
        texts = [_value(record, name) for name in field.names]
        for name, text in zip(field.names, texts, strict=True):
            if not isinstance(text, str):
                raise ValueError(f"field {name!r} holds a {type(text).__name__}; expected a string")
        return self._options.subfield_separator.join(texts)

    def _clip(self, name: str, value: object) -> NDArray[np.int32]:
        width = self._options.codes_per_frame
        try:
            codes = np.asarray(value)
        except (ValueError, OverflowError):
            codes = np.asarray(None)
        if codes.ndim != 1 or (codes.size and codes.dtype.kind not in "iu"):
            raise ValueError(f"field {name!r} holds something else than codes; expected a list of whole numbers")
        if not codes.size or codes.size % width:
            raise ValueError(
                f"field {name!r} holds {codes.size} codes; expected whole frames of {width}, at least one "
                "(codes_per_frame)"
            )
        codes = codes.reshape(-1, width)
        if self._options.max_frames is not None:
            codes = codes[uniform_frames(len(codes), self._options.max_frames)]
        try:
            return frame_tokens(codes, self._vocabulary)
        except ShapeError as error:
            raise ValueError(f"field {name!r}: {error}") from None


class LineCorpus:
    """The lines of files, by number. All are read once here, to know their lengths, and one when it is asked for.

    Raises:
        DataError: a file is packed or cannot be read, a line is wrong, or there is none.
    """

    def __init__(self, name: str, options: JsonlOptions, files: Sequence[Path], reader: LineReader) -> None:
        self.name, self.options = name, options
        self._files, self._reader = list(files), reader
        found: list[tuple[int, int, int, int]] = []
        for number, file in enumerate(self._files):
            found += [(number, line, at, len(self._sequence(number, line, raw))) for line, at, raw in _lines(file)]
        if not found:
            raise DataError(
                f"jsonl source {name!r}: {files[0]} holds no line{', nor do the others' * (len(files) > 1)}"
            )
        self._index = np.array(found, np.int64)  # file, line from 1, byte, tokens

    @property
    def lengths(self) -> NDArray[np.int64]:
        """``[L]`` tokens."""
        return self._index[:, 3]

    def place(self, number: int) -> str:
        """``file:line`` of a line."""
        file, line, _, _ = self._index[number]
        return f"{self._files[file]}:{line}"

    def sequence(self, number: int) -> TokenSequence:
        """The example of a line.

        Raises:
            DataError: its file is no longer what it was.
        """
        file, line, at, length = (int(value) for value in self._index[number])
        try:
            with self._files[file].open("rb") as opened:
                opened.seek(at)
                raw = opened.readline()
        except OSError as error:
            raise DataError(f"jsonl source {self.name!r}: {self._files[file]}: {reason_of(error)}") from None
        sequence = self._sequence(file, line, raw)
        if len(sequence) != length:
            raise DataError(f"jsonl source {self.name!r}: {self.place(number)}: was changed while it is trained on")
        return sequence

    def _sequence(self, file: int, line: int, raw: bytes) -> TokenSequence:
        return self._reader.sequence(raw, line, f"jsonl source {self.name!r}: {self._files[file]}:{line}")


def _value(record: dict[str, Any], name: str) -> Any:
    if name not in record:
        raise ValueError(f"has no field {name!r}; its fields are {', '.join(sorted(record)) or '(none)'}")
    return record[name]


def _lines(file: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number from 1, first byte and text of the lines that are not blank."""
    at = 0
    try:
        with file.open("rb") as opened:
            for number, raw in enumerate(opened, start=1):
                if raw.strip():
                    yield number, at, raw
                at += len(raw)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {reason_of(error)}") from error
