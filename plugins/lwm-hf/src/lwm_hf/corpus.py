"""Text files to train a tokenizer on: found, opened whatever their compression, read in pieces."""

from __future__ import annotations

import gzip
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from lwm_core.errors import DataError

# Two characters at least, so that a Windows drive (``C:\corpus.txt``) is a path.
_PACKAGED = re.compile(r"(?P<dist>[A-Za-z0-9][A-Za-z0-9._-]+):(?P<path>[^\\/].*)")


def locate(name: str, base_dir: Path) -> Path:
    """The file meant by a path from ``base_dir``, or by ``DIST:PATH`` inside the package of an installed distribution.

    The package is found by name (``lwm-data`` → ``lwm_data``) and never imported.

    Raises:
        DataError: there is no such file, or no such package.
    """
    packaged = _PACKAGED.fullmatch(name)
    if packaged is None:
        path = base_dir / Path(name).expanduser()
    else:
        spec = find_spec(re.sub(r"[.-]", "_", packaged["dist"]))
        if spec is None or not spec.submodule_search_locations:
            raise DataError(f"corpus {name!r}: {packaged['dist']} is not installed: pip install {packaged['dist']}")
        path = Path(spec.submodule_search_locations[0]) / packaged["path"]
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
