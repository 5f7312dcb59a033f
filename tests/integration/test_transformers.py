"""Model folders and the ``transformers`` library: each reads what the other writes, and gives the same logits.

The judge of our side is the float64 reference; no trainer is needed.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lwm_core.batch import TokenSequence, pack_rows
from lwm_core.model import canonical_shapes, preset
from lwm_core.reference import llama_logits
from lwm_core.rope import RopeSpec
from lwm_core.rope_scalings import linear, llama3, yarn
from lwm_core.testing import relative_l2
from lwm_core.vocab import Vocabulary
from lwm_core.weights import read_model_folder, write_model_folder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SEQ_LEN = 64
TOKENS = np.random.default_rng(3).integers(0, 60, (2, SEQ_LEN))
LLAMA3 = {"factor": 8.0, "original": 32}

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one key-value head a query head": {"num_kv_heads": 4},
    "tied": {"tie_embeddings": True},
    "biases": {"qkv_bias": True},
}
ROPES = {
    "LWM at 1M": RopeSpec(5e7),
    "llama3": llama3(5e5, 16, **LLAMA3),
    "yarn": yarn(1e4, 16, factor=4.0, original=16),
    "linear": linear(1e4, 16, factor=2.0),
}
CASES = [*((shape, "LWM at 1M") for shape in SHAPES), *(("plain", rope) for rope in ROPES if rope != "LWM at 1M")]


def model(**changes: Any) -> Any:
    values = {"hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, **changes}
    return preset("debug", Vocabulary(60), **values)


def theirs(folder: Path) -> np.ndarray:
    """``[B,S,V]`` logits by transformers, in float64."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    with torch.no_grad():
        return loaded(torch.from_numpy(TOKENS)).logits.numpy()  # type: ignore[no-any-return]


def ours(folder: Path) -> np.ndarray:
    """The same by the reference."""
    read = read_model_folder(folder)
    batch = pack_rows([[TokenSequence(row, np.ones(SEQ_LEN))] for row in TOKENS], SEQ_LEN)
    return llama_logits(read.parameters, read.model, read.rope, batch)


@pytest.mark.parametrize(("shape", "rope"), CASES)
def test_transformers_reads_what_we_write(shape: str, rope: str, tmp_path: Path) -> None:
    config = model(**SHAPES[shape])
    random = np.random.default_rng(0)
    values = {name: random.normal(0, 0.2, size).astype(np.float32) for name, size in canonical_shapes(config).items()}
    write_model_folder(tmp_path, config, ROPES[rope], SEQ_LEN, values.items())
    assert relative_l2(theirs(tmp_path), ours(tmp_path)) < 1e-6


@pytest.mark.parametrize("scaling", [None, "linear", "llama3", "yarn"])
def test_we_read_what_transformers_writes(scaling: str | None, tmp_path: Path) -> None:
    """Dealt to several files, as large models are, with the RoPE in transformers' own words."""
    words: dict[str, Any] = {"rope_theta": 1e5, "rope_type": "default"}
    if scaling is not None:
        words |= {"rope_type": scaling, "factor": 4.0}
    if scaling in ("llama3", "yarn"):
        words["original_max_position_embeddings"] = 16
    if scaling == "llama3":
        words |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=SEQ_LEN, rope_parameters=words, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert relative_l2(ours(tmp_path), theirs(tmp_path)) < 1e-6
