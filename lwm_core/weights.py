"""Model folders: ``model.safetensors`` with canonical names, and ``config.json``, a Hugging Face Llama configuration.

``config.json`` also holds a table ``lwm``: how the one vocabulary splits, the RoPE that Hugging Face has no words for,
and the length that was trained. A folder without it is read as a text-only model. Arrays are written one at a time at
their place in the file and mapped lazily when read, so a model never has to fit in memory twice. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lwm_core.errors import CheckpointError, LwmError, ShapeError
from lwm_core.model import ModelConfig, canonical_shapes
from lwm_core.rope import RopeSpec
from lwm_core.vocab import Vocabulary

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"

Dtype = Literal["float32", "bfloat16"]

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES: dict[str, str] = {"float32": "F32", "bfloat16": "BF16"}
_MOST_NAMED = 4  # parameters named in one message


class LazyParameters(Mapping[str, NDArray[Any]]):
    """Canonical name → array, mapped from the file when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries, self._start = _read_header(path)

    def __getitem__(self, name: str) -> NDArray[Any]:
        entry = self._entries[name]
        begin, _ = entry["data_offsets"]
        shape = tuple(entry["shape"])
        if 0 in shape:
            return np.zeros(shape, _DTYPES[entry["dtype"]])
        return np.memmap(self.path, _DTYPES[entry["dtype"]], mode="r", offset=self._start + begin, shape=shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of ``name``, without mapping it."""
        return tuple(self._entries[name]["shape"])


@dataclass(frozen=True)
class ModelFolder:
    """A model read from a folder: its shape, the RoPE and length it was trained with, and its parameters."""

    model: ModelConfig
    rope: RopeSpec
    seq_len: int
    parameters: LazyParameters


def write_model_folder(
    folder: Path,
    model: ModelConfig,
    rope: RopeSpec,
    seq_len: int,
    parameters: Iterable[tuple[str, NDArray[Any]]],
    dtype: Dtype = "float32",
) -> None:
    """Write a model; ``parameters`` gives (canonical name, array) in any order, each once.

    Raises:
        CheckpointError: a parameter is missing, unknown, given twice or of another shape.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shapes = canonical_shapes(model)
    target = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(np.float32)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + int(np.prod(shape, dtype=np.int64)) * target.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the arrays start at a multiple of 8, as the library writes them
    partial = folder / f"{WEIGHTS_FILE}.partial"
    missing = set(shapes)
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + offset)
        for name, array in parameters:
            if name not in missing:
                what = "is given twice" if name in shapes else "is no parameter of this model"
                raise CheckpointError(f"{folder}: parameter {name} {what}")
            if array.shape != shapes[name]:
                raise CheckpointError(f"{folder}: parameter {name} has shape {array.shape}; expected {shapes[name]}")
            missing.remove(name)
            file.seek(start + header[name]["data_offsets"][0])
            file.write(np.ascontiguousarray(array, dtype=target).tobytes())
        if missing:
            raise CheckpointError(f"{folder}: {_listed('missing', [n for n in shapes if n in missing])}")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / WEIGHTS_FILE)
    config = json.dumps(_to_huggingface(model, rope, seq_len, dtype), indent=2) + "\n"
    (folder / CONFIG_FILE).write_text(config, encoding="utf-8")


def read_model_folder(folder: Path) -> ModelFolder:
    """Read a model; the arrays stay in the file until they are asked for.

    Raises:
        CheckpointError: a file is missing or damaged, the architecture is another, or parameters do not match it.
    """
    model, rope, seq_len = read_model_config(folder)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {WEIGHTS_FILE}; expected a model folder with {CONFIG_FILE} beside it")
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
        return _from_huggingface(path, values)
    except KeyError as error:
        raise CheckpointError(f"{path}: {error.args[0]} is missing; expected a Llama configuration") from None
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, LwmError) and not isinstance(error, ShapeError):
            raise
        raise CheckpointError(f"{path}: {error}") from None


def _to_huggingface(model: ModelConfig, rope: RopeSpec, seq_len: int, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.rms_norm_eps,
        "initializer_range": model.init_std,
        "rope_theta": rope.theta,
        "max_position_embeddings": seq_len,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": model.qkv_bias,
        "mlp_bias": False,
        "vocab_size": model.vocabulary.size,
        "torch_dtype": dtype,
        "lwm": {
            "text_size": model.vocabulary.text_size,
            "vision_size": model.vocabulary.vision_size,
            "vision_codes": model.vocabulary.vision_codes,
            "rope_factors": None if rope.factors is None else list(rope.factors),
            "rope_attention_factor": rope.attention_factor,
            "seq_len": seq_len,
        },
    }


def _from_huggingface(path: Path, values: dict[str, Any]) -> tuple[ModelConfig, RopeSpec, int]:
    kind = values.get("model_type", "llama")
    if kind not in ("llama", "qwen2"):
        raise CheckpointError(f"{path}: model_type is {kind!r}; expected 'llama'")
    own = values.get("lwm")
    scaling = values.get("rope_scaling")
    if own is None and scaling:
        raise CheckpointError(f"{path}: rope_scaling {scaling!r} is not carried by this file's reader; expected none")
    own = own or {}
    heads = values["num_attention_heads"]
    vocabulary = Vocabulary(
        text_size=own.get("text_size", values["vocab_size"]),
        vision_size=own.get("vision_size", 0),
        vision_codes=own.get("vision_codes", 8192),
    )
    if vocabulary.size != values["vocab_size"]:
        raise CheckpointError(
            f"{path}: vocab_size is {values['vocab_size']}, but lwm.text_size + lwm.vision_size is {vocabulary.size}"
        )
    model = ModelConfig(
        vocabulary=vocabulary,
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or values["hidden_size"] // heads,
        tie_embeddings=values.get("tie_word_embeddings", False),
        rms_norm_eps=values["rms_norm_eps"],
        init_std=values.get("initializer_range", 0.02),
        qkv_bias=values.get("attention_bias", kind == "qwen2"),
    )
    factors = own.get("rope_factors")
    rope = RopeSpec(
        theta=float(values.get("rope_theta", 10_000.0)),
        factors=None if factors is None else tuple(factors),
        attention_factor=own.get("rope_attention_factor", 1.0),
    )
    return model, rope, int(own.get("seq_len", values["max_position_embeddings"]))


def _read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The entries of a safetensors file and where its arrays start; the library itself has checked the file."""
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
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(f"{path}: {name} is {entry['dtype']}; expected one of {', '.join(_DTYPES)}")
    return header, 8 + size


def _listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f"{len(names)} {what}: {', '.join(names[:_MOST_NAMED])}{more}"
