"""What ``lwm import`` holds in memory: never more than twice the largest parameter, wherever the model comes from.

Measured twice over: what NumPy allocates, and how far the process grows, mapped files included.
"""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hf_cases import as_lwm, write_stream

from lwm_core.cli import main
from lwm_core.model import ModelConfig, canonical_shapes, preset
from lwm_core.rope import RopeSpec
from lwm_core.testing.memory import can_measure, peak_growth
from lwm_core.vocab import Vocabulary
from lwm_core.weights import read_model_folder, write_model_folder
from lwm_hf.interchange.sources import TABLES

STREAM = ("--theta", "5e7", "--seq-len", "4096", "--heads", "4")
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
ROOM = 1.06  # of twice the largest: blocks in flight, the interpreter's own
VISION = 8448

SHAPES: dict[str, dict[str, Any]] = {
    "a table": {"hidden_size": 512, "intermediate_size": 1024},
    "a layer's query": {"hidden_size": 2048, "intermediate_size": 64, "head_dim": 1056, "num_kv_heads": 1},
}
TABLE = 2 * VISION


def model(what: str, vision: int, dtype: str) -> ModelConfig:
    """Its largest parameter, of the vocabulary that it ends with, takes 33 MiB in ``dtype``."""
    shape, wider = SHAPES[what], 1 if dtype == "float32" else 2
    text = 64 if what != "a table" else TABLE - abs(vision)
    return preset("debug", Vocabulary(text, max(vision, 0)), **{
        "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, **shape, "hidden_size": wider * shape["hidden_size"],
    })  # fmt: skip


def values_of(config: ModelConfig, dtype: str) -> dict[str, np.ndarray]:
    """No two rows or columns that lie near each other are alike."""
    found = {}
    for name, shape in canonical_shapes(config).items():
        rows, columns = np.arange(shape[0]) % 251, np.arange(shape[-1]) % 241
        table = np.add.outer(rows, columns) if len(shape) > 1 else rows
        found[name] = (table.astype(np.float32) / 64).astype(DTYPES[dtype])
    return found


def stream(at: Path, config: ModelConfig, values: dict[str, np.ndarray], dtype: str) -> None:
    write_stream(at, as_lwm(config, values))


def folder(at: Path, config: ModelConfig, values: dict[str, np.ndarray], dtype: str) -> None:
    write_model_folder(at, config, RopeSpec(5e7), 4096, values.items(), dtype)  # type: ignore[arg-type]


def bins(at: Path, config: ModelConfig, values: dict[str, np.ndarray], dtype: str) -> None:
    """A file for each parameter, so that what is mapped of one does not stay for the next."""
    torch = pytest.importorskip("torch")
    folder(at, config, values, dtype)
    (at / "model.safetensors").unlink()
    dealt = {name: f"pytorch_model-{number}.bin" for number, name in enumerate(values)}
    for name, value in values.items():
        bits = torch.from_numpy(value.view(np.int16 if dtype == "bfloat16" else np.float32))
        torch.save({name: bits.view(torch.bfloat16) if dtype == "bfloat16" else bits}, at / dealt[name])
    (at / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": dealt}))


CASES = [
    (stream, "a table", 0, "float32", "bfloat16"),
    (stream, "a table", 0, "bfloat16", "float32"),
    (stream, "a table", VISION, "float32", "float32"),
    (stream, "a table", VISION, "bfloat16", "bfloat16"),
    (stream, "a layer's query", 0, "bfloat16", "bfloat16"),
    (stream, "a table", -VISION, "bfloat16", "bfloat16"),
    (folder, "a table", 0, "float32", "bfloat16"),
    (folder, "a table", -VISION, "bfloat16", "bfloat16"),
    (bins, "a table", 0, "bfloat16", "bfloat16"),
    (bins, "a table", -VISION, "float32", "float32"),
]
"""(source, what is largest, rows for vision: negative to be added, dtypes)."""


@pytest.mark.skipif(not can_measure(), reason="the peak of a process is read from Linux's /proc")
@pytest.mark.parametrize(("start", "what", "vision", "read", "written"), CASES)
def test_no_more_than_twice_the_largest(
    start: Callable[..., None], what: str, vision: int, read: str, written: str, tmp_path: Path
) -> None:
    narrow = "float32" if "float32" in (read, written) else "bfloat16"
    config = model(what, vision, narrow)
    values = values_of(config, read)
    start(tmp_path / "source", config, values, read)
    words = ["import", str(tmp_path / "source"), str(tmp_path / "out"), "--dtype", written]
    words += STREAM if start is stream else ()
    words += ("--vision-size", str(-vision)) if vision < 0 else ()
    rows = {name: (value[::97].copy(), value.shape) for name, value in values.items()}
    del values
    grown_by = {name: -vision * config.hidden_size for name in TABLES if vision < 0}
    largest = max(prod(shape) + grown_by.get(name, 0) for name, (_, shape) in rows.items()) * DTYPES[narrow].itemsize
    assert largest >= 2**25
    tracemalloc.start()
    try:
        grown = peak_growth(lambda: main(words))
        allocated = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert allocated < 2 * ROOM * largest, allocated / largest
    assert grown < 2 * ROOM * largest, grown / largest
    found = read_model_folder(tmp_path / "out").parameters
    for name, (some, shape) in rows.items():
        assert np.array_equal(found[name][: shape[0] : 97], some.astype(DTYPES[written])), name
    print(f"{start.__name__} {what} {vision} {read} {written}: {allocated / largest:.2f} {grown / largest:.2f}")
