"""What ``lwm import`` reads, told by the files themselves: a model folder, Torch's bins, or LWM's stream.

Shapes: V vocabulary, E hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lwm_core.errors import CheckpointError, UnsupportedError, UsageError
from lwm_core.model import ModelConfig, canonical_shapes
from lwm_core.rope import RopeSpec
from lwm_core.vocab import Vocabulary
from lwm_core.weights import (
    CONFIG_FILE,
    GENERATION_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    read_model_config,
    read_model_folder,
)
from lwm_hf.interchange import lwm_model
from lwm_hf.interchange.stream_file import read_stream

Parameters = Iterator[tuple[str, NDArray[Any]]]
TOKENIZER_FILE = "tokenizer.json"
TORCH_FILE, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
DRAWN = 128  # rows drawn at a time
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Source:
    """A model to be imported.

    Args:
        model, rope, seq_len: its shape, RoPE and trained length.
        parameters: gives (canonical name, array), one at a time.
        what: the format, for people.
    """

    model: ModelConfig
    rope: RopeSpec
    seq_len: int
    parameters: Callable[[], Parameters]
    what: str


@dataclass(frozen=True)
class Unsaid:
    """What LWM's stream does not say of its model, as the user has said it."""

    theta: float | None = None
    seq_len: int | None = None
    heads: int = 32
    rms_norm_eps: float = 1e-5


def open_source(path: Path, unsaid: Unsaid) -> Source:
    """The model at ``path``.

    Raises:
        CheckpointError: a file is missing, damaged or of something else.
        UsageError: there is nothing at ``path``, or theta and length of a stream are not given.
        UnsupportedError: Torch's bins without torch.
    """
    if path.is_file():
        return _stream(path, unsaid)
    if not path.is_dir():
        raise UsageError(f"lwm import {path}: there is no such file or folder")
    if (path / WEIGHTS_FILE).is_file() or (path / INDEX_FILE).is_file():
        found = read_model_folder(path)
        return Source(found.model, found.rope, found.seq_len, lambda: iter(found.parameters.items()), "safetensors")
    if (path / TORCH_FILE).is_file() or (path / TORCH_INDEX).is_file():
        model, rope, seq_len = read_model_config(path)
        return Source(model, rope, seq_len, lambda: _torch_bins(path, model), "torch bins")
    raise CheckpointError(
        f"{path}: no {WEIGHTS_FILE}, {INDEX_FILE}, {TORCH_FILE} or {TORCH_INDEX}; expected a Hugging Face Llama with "
        f"{CONFIG_FILE}, or the file of LWM's JAX release itself"
    )


def special_ids(path: Path, tokenizer: Path | None) -> dict[str, Any]:
    """``bos``, ``eos`` and ``pad`` as the model at ``path`` has them, else the tokenizer in ``tokenizer``.

    Raises:
        DataError: the tokenizer's file is none, or nothing ends a document there.
    """
    if (path / CONFIG_FILE).is_file():
        files = [path / name for name in (CONFIG_FILE, GENERATION_FILE) if (path / name).is_file()]
        told = [json.loads(file.read_text(encoding="utf-8")) for file in files]  # what generates has the last word
        ids = {role: [one[f"{role}_token_id"] for one in told if one.get(f"{role}_token_id") is not None]
               for role in ("bos", "eos", "pad")}  # fmt: skip
        if any(ids.values()):
            return {role: found[-1] for role, found in ids.items() if found}
    if tokenizer is not None and (tokenizer / TOKENIZER_FILE).is_file():
        from lwm_hf.tokenizer import load_tokenizer

        return dict(load_tokenizer(tokenizer).special_ids)
    return {}


def _stream(path: Path, unsaid: Unsaid) -> Source:
    arrays = read_stream(path)
    if unsaid.theta is None or unsaid.seq_len is None:
        raise UsageError(
            f"lwm import {path}: LWM's stream does not say its RoPE theta and trained length; "
            "set --theta and --seq-len (LWM-1M: 5e7 and 1048576)"
        )
    model, rope = lwm_model.model_config(path, arrays, unsaid.heads, unsaid.rms_norm_eps), RopeSpec(unsaid.theta)
    return Source(model, rope, unsaid.seq_len, lambda: lwm_model.parameters(path, arrays, model), "LWM's stream")


def _torch_bins(folder: Path, model: ModelConfig) -> Parameters:
    """Parameters of ``pytorch_model*.bin``, mapped, weights alone: nothing that a pickle could run is run."""
    try:
        import torch
    except ImportError:
        raise UnsupportedError(f"{folder}: Torch's bins need torch to be read: pip install torch") from None
    names = [TORCH_FILE]
    if (folder / TORCH_INDEX).is_file():
        index = json.loads((folder / TORCH_INDEX).read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
    wanted = canonical_shapes(model)
    for name in names:
        try:
            tensors = torch.load(folder / name, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # torch raises of every kind
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{folder / name}: cannot be read as tensors alone: {reason}") from None
        for key, tensor in tensors.items():
            if key in wanted:  # older releases hold the rotary frequencies too
                yield key, _array_of(tensor.detach())


def _array_of(tensor: Any) -> NDArray[Any]:
    """The tensor's own memory as an array."""
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)  # type: ignore[no-any-return]
    return tensor.numpy()  # type: ignore[no-any-return]


def with_vision(source: Source, vision_size: int, dtype: str, seed: int = 0) -> Source:
    """The same model with ``vision_size`` rows for vision ids after the text's, drawn from N(0, init_std²).

    Args:
        source: a text model.
        vision_size: rows.
        dtype: of the grown tables.
        seed: of the draw.

    Raises:
        UsageError: it has such rows already.
    """
    has = source.model.vocabulary.vision_size
    if has:
        raise UsageError(f"--vision-size: the model has {has} rows for vision ids already; leave it out")
    vocabulary = Vocabulary(source.model.vocabulary.text_size, vision_size)
    model = replace(source.model, vocabulary=vocabulary)

    def grown() -> Parameters:
        random = np.random.default_rng(seed)
        for name, array in source.parameters():
            if name in TABLES:
                array = _with_rows(array, vision_size, dtype, model.init_std, random)
            yield name, array
            del array  # before the next is made

    return replace(source, model=model, parameters=grown)


def _with_rows(table: NDArray[Any], new: int, dtype: str, std: float, random: np.random.Generator) -> NDArray[Any]:
    """``[V + new, E]``: the table, and rows from N(0, std²)."""
    old, hidden = table.shape
    grown = np.empty((old + new, hidden), dtype)
    grown[:old] = table
    for start in range(old, old + new, DRAWN):
        part = grown[start : start + DRAWN]
        part[...] = random.normal(0.0, std, part.shape)
    return grown
