"""Files to documents: plain text, jsonl and parquet, packed with xz or gzip or not."""

from __future__ import annotations

import glob
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path

from lwm_core.errors import DataError

PACKED = (".xz", ".gz")
IN_FOLDERS = (".txt", ".jsonl", ".parquet")
"""What a folder gives; a file or a glob that is named may end in anything."""

CORPORA = {"kjv": "kjv.txt.xz"}


def find_files(pattern: str, base: Path, who: str, endings: Sequence[str] = IN_FOLDERS) -> list[Path]:
    """The files of a path, a folder (those with these ``endings``, in its subfolders too) or a glob, sorted by name.

    Raises:
        DataError: there is none.
    """
    path = base / Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and suffix_of(file) in endings)
        if not files:
            raise DataError(f"{who}: the folder {path} has no file that ends in {', '.join(endings)} (or .xz, .gz)")
        return files
    files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    if not files:
        raise DataError(f"{who}: {path} does not exist; expected a file, a folder or a glob that matches files")
    return files


def corpus_file(name: str) -> Path:
    """The file of a text that ships with this package."""
    return Path(str(resources.files("lwm_data") / "corpora" / CORPORA[name]))


def read_documents(file: Path, split: str) -> Iterator[str]:
    """The documents of a file, in order, as they stand there; documents of white space alone are left out.

    Args:
        file: ``.jsonl`` (a ``text`` field a line), ``.parquet`` (a ``text`` column) or plain UTF-8 text.
        split: ``file``, ``line`` or ``blank-line``: what a document is in plain text.

    Raises:
        DataError: the file cannot be read, is damaged, is not UTF-8, or has no ``text``.
    """
    suffix = suffix_of(file)
    if suffix == ".parquet":
        documents: Iterator[str] = _parquet(file)
    elif suffix == ".jsonl":
        documents = _jsonl(file)
    else:
        documents = _plain(unpack(file), split)
    return (document for document in documents if document.strip())


def suffix_of(file: Path) -> str:
    """What a file's name ends in, but for a packer's ending."""
    return (file.with_suffix("") if file.suffix in PACKED else file).suffix


def unpack(file: Path) -> str:
    """The text of a UTF-8 file, packed or not.

    Raises:
        DataError: it cannot be read, is damaged, or is not UTF-8.
    """
    try:
        data = file.read_bytes()
        if file.suffix == ".xz":
            data = lzma.decompress(data)
        elif file.suffix == ".gz":
            data = gzip.decompress(data)
    except (lzma.LZMAError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{file}: is damaged or not a {file.suffix} file: {reason_of(error)}") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {reason_of(error)}") from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 text at byte {error.start}; convert it, or leave it out") from error


def _plain(text: str, split: str) -> Iterator[str]:
    if split == "file":
        return iter([text])
    if split == "line":
        return iter(re.findall(r"[^\n]*\n|[^\n]+\Z", text))
    # A document keeps the blank lines that follow it, so that the pieces laid end to end are the file.
    return iter(re.findall(r"(?s).+?(?:\n[ \t\r]*\n\s*|\Z)", text))


def _jsonl(file: Path) -> Iterator[str]:
    for number, line in enumerate(unpack(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file}:{number}: is not JSON: {reason_of(error)}") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            got = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise DataError(f"{file}:{number}: expected an object with a string field 'text', got {got}")
        yield record["text"]


def _parquet(file: Path) -> Iterator[str]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(f"{file}: reading parquet needs pyarrow: pip install 'lwm-data[parquet]'") from error
    try:
        with parquet.ParquetFile(file) as table:
            if "text" not in table.schema_arrow.names:
                raise DataError(f"{file}: has no column 'text', its columns are {table.schema_arrow.names}")
            kind = table.schema_arrow.field("text").type
            if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
                raise DataError(f"{file}: its column 'text' holds {kind}, expected strings")
            for batch in table.iter_batches(columns=["text"]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: cannot be read as parquet: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
