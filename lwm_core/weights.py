"""Model folders: ``model.safetensors`` with canonical names, and ``config.json`` (see :mod:`lwm_core.llama_config`).

Arrays are written one at a time at their place in the file and mapped lazily when read, so a model never has to fit in
memory twice. A large model's arrays are dealt to several files, with ``model.safetensors.index.json``, as Hugging Face
keeps them. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lwm_core.errors import CheckpointError, LwmError, ShapeError
from lwm_core.llama_config import from_huggingface, to_huggingface
from lwm_core.model import ModelConfig, canonical_shapes
from lwm_core.rope import RopeSpec

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
FILE_BYTES = 5_000_000_000
"""What one file of arrays may hold: the size that transformers long had."""
_PARTIAL = ".partial"

Dtype = Literal["float32", "bfloat16"]

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES: dict[str, str] = {"float32": "F32", "bfloat16": "BF16"}
_MOST_NAMED = 4  # parameters named in one message
_BLOCK = 4 * 2**20  # bytes that are converted and written at a time


@dataclass(frozen=True)
class _Place:
    """Where an array lies in a file."""

    path: Path
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class LazyParameters(Mapping[str, NDArray[Any]]):
    """Canonical name → array, mapped from its file when it is asked for.

    Raises:
        CheckpointError: a file is missing or damaged, holds a name that another holds too, or lacks one that the index
            promises.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places = _indexed(path) if path.name.endswith(".index.json") else _read_header(path)

    def __getitem__(self, name: str) -> NDArray[Any]:
        place = self._places[name]
        if 0 in place.shape:
            return np.zeros(place.shape, place.dtype)
        return np.memmap(place.path, place.dtype, mode="r", offset=place.offset, shape=place.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of ``name``, without mapping it."""
        return self._places[name].shape


@dataclass(frozen=True)
class ModelFolder:
    """A model read from a folder: its shape, the RoPE and length it was trained with, and its parameters."""

    model: ModelConfig
    rope: RopeSpec
    seq_len: int
    parameters: LazyParameters


def write_model_folder(
    folder: Path, model: ModelConfig, rope: RopeSpec, seq_len: int, parameters: Iterable[tuple[str, NDArray[Any]]],
    dtype: Dtype = "float32", *, special_ids: Mapping[str, Any] = MappingProxyType({}), file_bytes: int = FILE_BYTES,
) -> None:  # fmt: skip
    """Write a model; ``parameters`` gives (canonical name, array) in any order, each once.

    One array is held at a time, and a few MiB of it in ``dtype``. Nothing has its name before all of it is written.

    Args:
        special_ids: of the tokenizer, by role; ``bos``, ``eos`` and ``pad`` are told to whoever generates.
        file_bytes: arrays of more than this together are dealt to several files, each of no more than this but for one
            array that is larger alone.

    Raises:
        CheckpointError: a parameter is missing, unknown, given twice or of another shape.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shapes = canonical_shapes(model)
    target = _DTYPES[_CODES[dtype]]
    dealt = _dealt(shapes, target.itemsize, file_bytes)
    places: dict[str, _Place] = {}
    for name, held in dealt.items():
        places |= _begin_file(folder / f"{name}{_PARTIAL}", {key: shapes[key] for key in held}, target, _CODES[dtype])
    missing = set(shapes)
    for name, array in parameters:
        if name not in missing:
            what = "is given twice" if name in shapes else "is no parameter of this model"
            raise CheckpointError(f"{folder}: parameter {name} {what}")
        if array.shape != shapes[name]:
            raise CheckpointError(f"{folder}: parameter {name} has shape {array.shape}; expected {shapes[name]}")
        missing.remove(name)
        with places[name].path.open("r+b") as file:
            file.seek(places[name].offset)
            _write(file, array, target)
        del array  # before the next is made
    if missing:
        raise CheckpointError(f"{folder}: {_listed('missing', [n for n in shapes if n in missing])}")
    _name_files(folder, dealt, sum(prod(shape) for shape in shapes.values()), target.itemsize)
    roles = {f"{role}_token_id": special_ids.get(role) for role in ("bos", "eos", "pad")}
    for name, values in (
        (GENERATION_FILE, {key: value for key, value in roles.items() if value is not None}),
        (CONFIG_FILE, {**to_huggingface(model, rope, seq_len, dtype), **roles}),
    ):
        _write_json(folder / name, values)


def _dealt(shapes: Mapping[str, tuple[int, ...]], itemsize: int, file_bytes: int) -> dict[str, list[str]]:
    """File → the parameters that it holds, in their order, named as ``transformers`` names them."""
    files: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        size = prod(shape) * itemsize
        if files[-1] and held + size > file_bytes:
            files.append([])
            held = 0
        files[-1].append(name)
        held += size
    if len(files) == 1:
        return {WEIGHTS_FILE: files[0]}
    return {f"model-{number:05}-of-{len(files):05}.safetensors": one for number, one in enumerate(files, 1)}


def _begin_file(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype[Any], code: str
) -> dict[str, _Place]:
    """Write a safetensors file's header and make room for its arrays; tells where each lies."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + prod(shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the arrays start at a multiple of 8, as the library writes them
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + offset)
    return {name: _Place(path, start + header[name]["data_offsets"][0], dtype, shapes[name]) for name in shapes}


def _name_files(folder: Path, dealt: Mapping[str, list[str]], count: int, itemsize: int) -> None:
    """Give what is written its names; what an earlier model of another size has left goes first."""
    for name in dealt:
        with (folder / f"{name}{_PARTIAL}").open("rb+") as file:
            os.fsync(file.fileno())
    # Without an index, files of which some are of an earlier model and some of this are read as no model at all.
    (folder / INDEX_FILE).unlink(missing_ok=True)
    for old in (WEIGHTS_FILE, *(path.name for path in folder.glob("model-*-of-*.safetensors"))):
        if old not in dealt:
            (folder / old).unlink(missing_ok=True)
    for name in dealt:
        (folder / f"{name}{_PARTIAL}").replace(folder / name)
    if len(dealt) > 1:
        files = {key: name for name, held in dealt.items() for key in held}
        totals = {"total_parameters": count, "total_size": count * itemsize}
        _write_json(folder / INDEX_FILE, {"metadata": totals, "weight_map": files})


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    partial = path.with_name(f"{path.name}{_PARTIAL}")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def _write(file: IO[bytes], array: NDArray[Any], target: np.dtype[Any]) -> None:
    """The array row by row, whatever its order and dtype in memory; converted a few MiB at a time."""
    rows = max(1, _BLOCK // max(1, target.itemsize * prod(array.shape[1:])))
    for start in range(0, len(array), rows):
        block = np.ascontiguousarray(array[start : start + rows], dtype=target)
        file.write(block.reshape(-1).view(np.uint8).data)


def read_model_folder(folder: Path) -> ModelFolder:
    """Read a model; the arrays stay in the file until they are asked for.

    Raises:
        CheckpointError: a file is missing or damaged, the architecture is another, or parameters do not match it.
    """
    model, rope, seq_len = read_model_config(folder)
    path = next((folder / name for name in (WEIGHTS_FILE, INDEX_FILE) if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(
            f"{folder}: no {WEIGHTS_FILE} and no {INDEX_FILE}; expected a model folder with {CONFIG_FILE} beside it"
        )
    parameters = LazyParameters(path)
    shapes = canonical_shapes(model)
    problems = []
    missing = [name for name in shapes if name not in parameters]
    unknown = [name for name in parameters if name not in shapes]
    wrong = [
        f"{name} is {parameters.shape(name)}, expected {shapes[name]}"
        for name in shapes
        if name in parameters and parameters.shape(name) != shapes[name]
    ]
    for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", wrong)):
        if names:
            problems.append(_listed(what, names))
    if problems:
        raise CheckpointError(f"{path} does not match its {CONFIG_FILE}: {'; '.join(problems)}")
    return ModelFolder(model, rope, seq_len, parameters)


def read_model_config(folder: Path) -> tuple[ModelConfig, RopeSpec, int]:
    """The shape, the RoPE and the trained length of the model in ``folder``, without its parameters.

    Raises:
        CheckpointError: ``config.json`` is missing, damaged, or describes something that is not such a Llama.
    """
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {CONFIG_FILE}; expected a model folder with {WEIGHTS_FILE}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    try:
        return from_huggingface(path, values)
    except KeyError as error:
        raise CheckpointError(f"{path}: {error.args[0]} is missing; expected a Llama configuration") from None
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, LwmError) and not isinstance(error, ShapeError):
            raise
        raise CheckpointError(f"{path}: {error}") from None


def _read_header(path: Path) -> dict[str, _Place]:
    """Where the arrays of a safetensors file lie; the library itself has checked the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(size))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from None
    header.pop("__metadata__", None)
    places = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(f"{path}: {name} is {entry['dtype']}; expected one of {', '.join(_DTYPES)}")
        offset = 8 + size + entry["data_offsets"][0]
        places[name] = _Place(path, offset, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return places


def _indexed(path: Path) -> dict[str, _Place]:
    """Where the arrays lie that an index deals to the files beside it."""
    try:
        dealt = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(dealt.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not an index with a weight_map of parameter to file: {error!r}") from None
    places: dict[str, _Place] = {}
    for name in files:
        part = path.parent / name
        if part.parent != path.parent or not part.is_file():
            raise CheckpointError(f"{path}: there is no file {name!r} beside it; the download or copy is not whole")
        for parameter, place in _read_header(part).items():
            if dealt.get(parameter, name) != name:
                raise CheckpointError(f"{path}: {parameter} is in {name}, but the index has it in {dealt[parameter]}")
            places[parameter] = place
    missing = [parameter for parameter in dealt if parameter not in places]
    if missing:
        raise CheckpointError(f"{path}: {_listed('promised but in none of its files', missing)}")
    return places


def _listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f"{len(names)} {what}: {', '.join(names[:_MOST_NAMED])}{more}"
