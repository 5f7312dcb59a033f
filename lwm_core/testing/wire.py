"""Messages between the kit and its workers: a JSON header and named arrays, each with its length before it.

No pickle: arrays go as ``.npy`` with ``allow_pickle=False``. A dtype that NumPy does not know by itself (bfloat16)
goes as unsigned integers of its width, its name in the header.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Header = dict[str, Any]
Arrays = dict[str, NDArray[Any]]

_LENGTH = struct.Struct("<Q")


def send(stream: BinaryIO, header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]] | None = None) -> None:
    """Write one message."""
    parts, entries = [], []
    for name, array in (arrays or {}).items():
        plain = np.ascontiguousarray(array).reshape(np.shape(array))
        extended = plain.dtype.kind == "V" or not plain.dtype.isbuiltin
        entries.append([name, plain.dtype.name if extended else None])
        if extended:
            plain = plain.view(f"u{plain.dtype.itemsize}")
        buffer = io.BytesIO()
        np.save(buffer, plain, allow_pickle=False)
        parts.append(buffer.getvalue())
    for part in (json.dumps({"header": header, "arrays": entries}).encode(), *parts):
        stream.write(_LENGTH.pack(len(part)))
        stream.write(part)
    stream.flush()


def receive(stream: BinaryIO) -> tuple[Header, Arrays] | None:
    """Read one message; none at the end of the stream.

    Raises:
        EOFError: the stream ends inside a message.
    """
    first = _part(stream, at_start=True)
    if first is None:
        return None
    message = json.loads(first)
    arrays: Arrays = {}
    for name, extended in message["arrays"]:
        part = _part(stream)
        array = np.load(io.BytesIO(part or b""), allow_pickle=False)
        arrays[name] = array if extended is None else array.view(np.dtype(getattr(ml_dtypes, extended)))
    return message["header"], arrays


def _part(stream: BinaryIO, at_start: bool = False) -> bytes | None:
    length = _exactly(stream, _LENGTH.size, at_start)
    return None if length is None else _exactly(stream, _LENGTH.unpack(length)[0])


def _exactly(stream: BinaryIO, size: int, at_start: bool = False) -> bytes | None:
    chunks, left = [], size
    while left:
        chunk = stream.read(left)
        if not chunk:
            if at_start and left == size:
                return None
            raise EOFError(f"the stream ended {left} bytes before the end of a message")
        chunks.append(chunk)
        left -= len(chunk)
    return b"".join(chunks)
