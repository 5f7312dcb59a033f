"""Files of captions: a text, and a question or not, by the name of a picture or video."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from lwm_core.errors import DataError
from lwm_data.read import reason_of, suffix_of, unpack


class Caption(NamedTuple):
    """A line: the name of the clip in its folder of codes, what is said of it, and what is asked; its number from 1."""

    name: str
    text: str
    question: str
    line: int


def read_captions(file: Path, who: str) -> list[Caption]:
    """The lines of a ``.jsonl`` or ``.tsv``, in order; spaces around texts are cut off.

    Raises:
        DataError: the file is missing, damaged or neither of the two, or a line has no name or no text.
    """
    suffix = suffix_of(file)
    if suffix not in (".jsonl", ".tsv"):
        raise DataError(f"{who}: {file} is no file of captions; expected a name that ends in .jsonl or .tsv")
    read = _jsonl if suffix == ".jsonl" else _tsv
    try:
        text = unpack(file)
    except DataError as error:
        raise DataError(f"{who}: {error}") from None
    captions = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{who}: {file}:{number}"
        name, said, question = read(line.rstrip("\r"), place)
        if not name or not said.strip():
            raise DataError(f"{place}: has no {'text' if name else 'name'}; expected both")
        captions.append(Caption(name, said.strip(), question.strip(), number))
    if not captions:
        raise DataError(f"{who}: {file} has no lines; expected the name and the text of a clip in each")
    return captions


def _jsonl(line: str, place: str) -> tuple[str, str, str]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: is not JSON: {reason_of(error)}") from None
    found = [record.get(key, "") for key in Caption._fields[:3]] if isinstance(record, dict) else []
    if not found or not all(isinstance(value, str) for value in found):
        raise DataError(f"{place}: expected an object with the strings 'name' and 'text', and 'question' or not")
    return found[0], found[1], found[2]


def _tsv(line: str, place: str) -> tuple[str, str, str]:
    cells = line.split("\t")
    if len(cells) != 2:
        raise DataError(f"{place}: has {len(cells)} columns; expected a name, a tab and a text")
    return cells[0], cells[1], ""
