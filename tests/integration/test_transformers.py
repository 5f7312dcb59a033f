"""Model folders and the ``transformers`` library: each reads what the other writes, and gives the same logits.

The judge of our side is the float64 reference; no trainer is needed.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

from dataclasses import replace
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
from lwm_core.weights import read_model_config, read_model_folder, write_model_folder

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


def test_a_large_model_is_dealt_to_files_that_transformers_reads(tmp_path: Path) -> None:
    """No file above the size, but for one parameter that is larger alone."""
    config = model()
    random = np.random.default_rng(0)
    values = {name: random.normal(0, 0.2, size).astype(np.float32) for name, size in canonical_shapes(config).items()}
    write_model_folder(tmp_path, config, ROPES["llama3"], SEQ_LEN, values.items(), file_bytes=20_000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 5 and not (tmp_path / "model.safetensors").exists()
    assert relative_l2(theirs(tmp_path), ours(tmp_path)) < 1e-6


@pytest.mark.parametrize("rope", [name for name in ROPES if name != "LWM at 1M"])
def test_a_scaling_keeps_its_words(rope: str, tmp_path: Path) -> None:
    """There and back through transformers' own configuration: the same name, parameters and frequencies."""
    config, spec = model(), ROPES[rope]
    assert spec.scaling is not None and spec.scaling.name == rope
    values = {name: np.zeros(size, np.float32) for name, size in canonical_shapes(config).items()}
    write_model_folder(tmp_path, config, spec, SEQ_LEN, values.items())
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    words = dict(spec.scaling.parameters)
    expected = {"rope_type": rope, "rope_theta": spec.theta, **words}
    if "original" in words:
        expected["original_max_position_embeddings"] = expected.pop("original")
    assert {name: read.rope_parameters[name] for name in expected} == expected
    del read.lwm  # what is left is transformers' own
    read.save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path, tmp_path / "theirs"):
        again = read_model_config(folder)[1]
        assert again == spec and again.scaling == spec.scaling


def test_words_that_are_not_the_factors_are_not_said(tmp_path: Path) -> None:
    """What no name stands for leaves as longrope, and so does a name whose factors were changed."""
    spec = ROPES["llama3"]
    assert spec.factors is not None
    changed = replace(spec, factors=tuple(0.9 * factor for factor in spec.factors))
    values = {name: np.zeros(size, np.float32) for name, size in canonical_shapes(model()).items()}
    for number, one in enumerate((changed, RopeSpec(1e4, (0.5,) * 8), RopeSpec(1e4, None, 1.2))):
        write_model_folder(tmp_path / str(number), model(), one, SEQ_LEN, values.items())
        read = transformers.AutoConfig.from_pretrained(tmp_path / str(number))
        assert read.rope_parameters["rope_type"] == "longrope"
        assert read_model_config(tmp_path / str(number))[1] == one


READ: dict[str, dict[str, Any]] = {
    "grouped heads": {}, "one key-value head a query head": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
}  # fmt: skip
WORDS = [("grouped heads", 1e5, None), *((shape, 5e7, "llama3") for shape in READ), ("tied", 5e7, None),
         ("grouped heads", 1e5, "linear"), ("grouped heads", 1e5, "yarn")]  # fmt: skip


@pytest.mark.parametrize(("shape", "theta", "scaling"), WORDS)
def test_we_read_what_transformers_writes(shape: str, theta: float, scaling: str | None, tmp_path: Path) -> None:
    """Dealt to several files, as large models are, with the RoPE in transformers' own words."""
    words: dict[str, Any] = {"rope_theta": theta, "rope_type": "default"}
    if scaling is not None:
        words |= {"rope_type": scaling, "factor": 4.0}
    if scaling in ("llama3", "yarn"):
        words["original_max_position_embeddings"] = 16
    if scaling == "llama3":
        words |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=SEQ_LEN, rope_parameters=words, initializer_range=0.2,
        **{"num_key_value_heads": 2, **READ[shape]},
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert relative_l2(ours(tmp_path), theirs(tmp_path)) < 1e-6
