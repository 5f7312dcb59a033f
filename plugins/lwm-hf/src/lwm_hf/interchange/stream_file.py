"""The stream of arrays in which LWM's JAX code keeps a model: found without being loaded, read a part at a time.

A file is records one after the other, each MessagePack's ``[key path, bytes]``; the bytes are an array as
``flax.serialization.to_bytes`` packs it: an extension of type 1 with ``(shape, dtype name, data)``, or, beyond a GiB, a
map ``{"__msgpack_chunked_array__": true, "shape", "chunks"}`` of flat ones. Nothing is pickled or executed.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lwm_core.errors import CheckpointError

ARRAY = 1
"""flax's extension type of an array."""

CHUNKED = "__msgpack_chunked_array__"
BLOCK = 4 * 2**20
"""Bytes read at a time."""


class Span(NamedTuple):
    """Bytes of the file."""

    start: int
    stop: int


class Extension(NamedTuple):
    """An extension's type and bytes."""

    code: int
    span: Span


@dataclass(frozen=True)
class StoredArray:
    """An array that lies in a file, flat, in one piece or several."""

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    pieces: tuple[Span, ...]

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """``array[start:stop]``, and nothing else of it, read."""
        width, at = prod(self.shape[1:]) * self.dtype.itemsize, 0
        found = np.empty((stop - start) * width, np.uint8)
        with self.path.open("rb") as file:
            for piece in self._cut(start * width, stop * width):
                size = piece.stop - piece.start
                file.seek(piece.start)
                file.readinto(found[at : at + size])
                at += size
        return found.view(self.dtype).reshape(stop - start, *self.shape[1:])

    def whole(self) -> NDArray[Any]:
        """All of it."""
        return self.rows(0, self.shape[0])

    def layer(self, index: int) -> StoredArray:
        """``array[index]``, not read yet."""
        size = prod(self.shape[1:]) * self.dtype.itemsize
        return StoredArray(self.path, self.dtype, self.shape[1:], tuple(self._cut(index * size, (index + 1) * size)))

    def read_into(self, found: NDArray[Any]) -> None:
        """Fill an array of this shape, or with axes after the first split, reading a few MiB at a time."""
        step = max(1, BLOCK // max(1, prod(self.shape[1:]) * self.dtype.itemsize))
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            found[start:stop] = self.rows(start, stop).reshape(stop - start, *found.shape[1:])

    def _cut(self, first: int, last: int) -> Iterator[Span]:
        """Where the bytes from ``first`` to ``last`` of the array lie.

        Raises:
            CheckpointError: it has no so many.
        """
        size = prod(self.shape) * self.dtype.itemsize
        if last > size:
            raise CheckpointError(f"{self.path}: an array {self.shape} is asked for byte {last} of {size}")
        at = 0
        for piece in self.pieces:
            low, high = max(first, at), min(last, at + piece.stop - piece.start)
            if low < high:
                yield Span(piece.start + low - at, piece.start + high - at)
            at += piece.stop - piece.start


class _Reader:
    """MessagePack (the specification of github.com/msgpack/msgpack), with bytes and extensions left where they are."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data

    def number(self, at: int, size: int) -> int:
        """An unsigned integer of ``size`` bytes.

        Raises:
            EOFError: the file ends before.
        """
        if at + size > len(self.data):
            raise EOFError
        return int.from_bytes(self.data[at : at + size], "big")

    def span(self, at: int, size: int) -> Span:
        if at + size > len(self.data):
            raise EOFError
        return Span(at, at + size)

    def value(self, at: int) -> tuple[Any, int]:
        """What begins at ``at``, and where it ends.

        Raises:
            EOFError: the file ends before.
            ValueError: it is nothing that such a file holds.
        """
        code = self.number(at, 1)
        at += 1
        if code < 0x80:
            return code, at
        if code < 0x90:
            return self.map(at, code & 0x0F)
        if code < 0xA0:
            return self.array(at, code & 0x0F)
        if code < 0xC0:
            return self.text(at, code & 0x1F)
        if code in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[code], at
        if 0xCC <= code <= 0xCF:
            size = 1 << (code - 0xCC)
            return self.number(at, size), at + size
        if 0xD4 <= code <= 0xD8:
            return self.extension(at, 1 << (code - 0xD4))
        for first, last, read in (
            (0xC4, 0xC6, self.binary), (0xC7, 0xC9, self.extension), (0xD9, 0xDB, self.text),
        ):  # fmt: skip
            if first <= code <= last:
                width = 1 << (code - first)
                return read(at + width, self.number(at, width))
        if code in (0xDC, 0xDD, 0xDE, 0xDF):
            width = 2 if code in (0xDC, 0xDE) else 4
            read = self.array if code < 0xDE else self.map
            return read(at + width, self.number(at, width))
        raise ValueError(f"byte {code:#x}")

    def binary(self, at: int, size: int) -> tuple[Span, int]:
        return self.span(at, size), at + size

    def extension(self, at: int, size: int) -> tuple[Extension, int]:
        return Extension(self.number(at, 1), self.span(at + 1, size)), at + 1 + size

    def text(self, at: int, size: int) -> tuple[str, int]:
        span = self.span(at, size)
        return self.data[span.start : span.stop].decode(), at + size

    def array(self, at: int, count: int) -> tuple[list[Any], int]:
        found = []
        for _ in range(count):
            one, at = self.value(at)
            found.append(one)
        return found, at

    def map(self, at: int, count: int) -> tuple[dict[Any, Any], int]:
        found = {}
        for _ in range(count):
            key, at = self.value(at)
            found[key], at = self.value(at)
        return found, at

    def stored(self, path: Path, span: Span) -> StoredArray:
        """The array that ``span`` holds.

        Raises:
            ValueError: it holds none, or one whose size is not its shape's.
        """
        one, end = self.value(span.start)
        if end != span.stop:
            raise ValueError("bytes after an array")
        if isinstance(one, dict) and one.get(CHUNKED):
            parts = [self._flat(part) for _, part in sorted(one["chunks"].items(), key=lambda row: int(row[0]))]
            shape = tuple(size for _, size in sorted(one["shape"].items(), key=lambda row: int(row[0])))
        else:
            parts = [self._flat(one)]
            shape = parts[0][0]
        dtype = parts[0][1]
        if sum(data.stop - data.start for _, _, data in parts) != prod(shape) * dtype.itemsize:
            raise ValueError(f"an array {shape} of {dtype} with another number of bytes")
        return StoredArray(path, dtype, shape, tuple(data for _, _, data in parts))

    def _flat(self, one: Any) -> tuple[tuple[int, ...], np.dtype[Any], Span]:
        if not isinstance(one, Extension) or one.code != ARRAY:
            raise ValueError("something that is no array")
        (shape, name, data), _ = self.value(one.span.start)
        dtype = np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
        if dtype.kind not in "fV" or not isinstance(data, Span):
            raise ValueError(f"an array of {name}")
        return tuple(shape), dtype, data


def read_stream(path: Path, wanted: str = "params") -> dict[tuple[str, ...], StoredArray]:
    """Key path → array, for the records whose path begins with ``wanted``; ``wanted`` itself is left out of the paths.

    Raises:
        CheckpointError: the file is damaged, cut off, or something else.
    """
    found: dict[tuple[str, ...], StoredArray] = {}
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: is empty; expected LWM's stream of parameters")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader, at = _Reader(data), 0
        try:
            while at < len(data):
                (key, span), at = reader.value(at)
                path_of = tuple(str(part) for part in key)
                if path_of[0] != wanted:
                    continue
                while path_of[0] == wanted:
                    path_of = path_of[1:]
                found[path_of] = reader.stored(path, span)
        except EOFError:
            raise CheckpointError(f"{path}: ends inside a record; the copy or download is not whole") from None
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: not LWM's stream of parameters: {error} at byte {at}") from None
    return found
