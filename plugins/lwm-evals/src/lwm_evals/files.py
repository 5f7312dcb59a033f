"""Files that survive being killed: an atomic write, and the journal of evaluated samples."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lwm_core.durable import write_whole

Row = dict[str, Any]
Key = tuple[str, int, int]
"""(stage, length, sample)."""


def write_atomically(path: Path, data: bytes) -> None:
    """See ``lwm_core.durable.write_whole``; the folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, data)


class Journal:
    """Rows of evaluated samples, appended batch by batch to a ``.jsonl`` and on disk before :meth:`append` returns.

    Each line is one row with its ``stage``, ``length``, ``sample`` and the ``settings`` that made it. Opening cuts the
    file at its first unreadable line (what a kill in the middle of a write leaves), so those samples are done again.
    A file of other settings is put aside as ``<name>.<settings>.jsonl``: its rows answer other questions.

    Args:
        path: the journal; made with its folder when the first rows come.
        settings: fingerprint of everything that decides on the questions.
    """

    def __init__(self, path: Path, settings: str) -> None:
        self._path = path
        self._settings = settings
        self.rows: dict[Key, Row] = {}
        if path.exists():
            self._open()

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows and wait until they are on disk; a sample that is there already is left as it is."""
        new = {key_of(row): {**row, "settings": self._settings} for row in rows}
        new = {key: row for key, row in new.items() if key not in self.rows}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.write("".join(json.dumps(row) + "\n" for row in new.values()).encode())
            file.flush()
            os.fsync(file.fileno())
        self.rows.update(new)

    def _open(self) -> None:
        data = self._path.read_bytes()
        rows, good = _read(data)
        other = next((row["settings"] for row in rows if row["settings"] != self._settings), None)
        if other is not None:
            self._path.rename(self._path.with_suffix(f".{other}.jsonl"))
            return
        if good < len(data):
            os.truncate(self._path, good)
        for row in rows:
            self.rows.setdefault(key_of(row), row)


def key_of(row: Mapping[str, Any]) -> Key:
    """What a row is known by."""
    return str(row["stage"]), int(row["length"]), int(row["sample"])


def _read(data: bytes) -> tuple[list[Row], int]:
    """The rows up to the first unreadable line, and how many bytes they take."""
    rows: list[Row] = []
    good = 0
    for line in data.splitlines(keepends=True):
        try:
            row = json.loads(line)
            key_of(row)
            row["settings"] = str(row["settings"])
        except (ValueError, KeyError, TypeError):
            break
        if not line.endswith(b"\n"):  # whole by chance; without its end the next line would be glued to it
            break
        rows.append(row)
        good += len(line)
    return rows, good
