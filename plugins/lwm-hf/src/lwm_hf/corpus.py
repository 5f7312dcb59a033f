"""Text files to train a tokenizer on: found, opened whatever their compression, read in pieces."""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from lwm_core import packaged
from lwm_core.errors import DataError


def locate(name: str, base_dir: Path) -> Path:
    """The file meant by ``name``; see :func:`lwm_core.packaged.locate`.

    Raises:
        DataError: there is no such file, or no such package.
    """
    try:
        path = packaged.locate(name, base_dir)
    except DataError as error:
        raise DataError(f"corpus {error}") from None
    if not path.is_file():
        raise DataError(f"corpus {name!r}: there is no file {path}; give a text file (.txt, .xz, .gz)")
    return path


def read_texts(paths: Iterable[Path], *, piece: int = 1 << 16) -> Iterator[str]:
    """The files' text as whole lines, in pieces of about ``piece`` characters; line ends stay as they are.

    Raises:
        DataError: a file is not UTF-8 text, or its compression is damaged.
    """
    for path in paths:
        try:
            with _opened(path) as file:
                while lines := file.readlines(piece):
                    yield "".join(lines)
        except UnicodeDecodeError as error:
            raise DataError(f"corpus {path}: byte {error.start} is not UTF-8 text; convert the file") from error
        except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise DataError(f"corpus {path}: cannot be unpacked ({error}); fetch the file again") from error
        except OSError as error:
            raise DataError(f"corpus {path}: cannot be read ({error.strerror})") from error


def _opened(path: Path) -> IO[str]:
    # newline="": a tokenizer must see the line ends that it will be given.
    match path.suffix.lower():
        case ".xz":
            return lzma.open(path, "rt", encoding="utf-8", newline="")
        case ".gz":
            return gzip.open(path, "rt", encoding="utf-8", newline="")
        case _:
            return path.open(encoding="utf-8", newline="")
