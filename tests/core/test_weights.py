"""Model folders, with the safetensors library as the independent reader and writer."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lwm_core.errors import CheckpointError
from lwm_core.model import ModelConfig, canonical_shapes, preset
from lwm_core.rope import RopeSpec
from lwm_core.rope_scalings import llama3
from lwm_core.vocab import Vocabulary
from lwm_core.weights import read_model_config, read_model_folder, write_model_folder

ROPE = RopeSpec(5e5, tuple(1.0 / (1 + i) for i in range(4)), 1.1)


def model(**changes: Any) -> ModelConfig:
    values = {"hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, **changes}
    return preset("debug", Vocabulary(40, 12, 8), **values)


def arrays(config: ModelConfig) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in canonical_shapes(config).items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_reads_back_as_it_was_written(tmp_path: Path, dtype: Any, tied: bool) -> None:
    config = model(tie_embeddings=tied)
    values = arrays(config)
    write_model_folder(tmp_path, config, ROPE, 512, reversed(values.items()), dtype)
    read = read_model_folder(tmp_path)
    assert (read.model, read.rope, read.seq_len) == (config, ROPE, 512)
    assert set(read.parameters) == set(values)
    target = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    for name, value in values.items():
        assert read.parameters[name].dtype == target
        assert np.array_equal(read.parameters[name], value.astype(target)), name


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    config = model()
    values = arrays(config)
    write_model_folder(tmp_path, config, ROPE, 512, values.items())
    loaded = load_file(tmp_path / "model.safetensors")
    assert {name: value.tobytes() for name, value in loaded.items()} == {n: v.tobytes() for n, v in values.items()}


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    config = model()
    values = arrays(config)
    write_model_folder(tmp_path, config, ROPE, 512, values.items())
    save_file(dict(reversed(values.items())), tmp_path / "model.safetensors")
    read = read_model_folder(tmp_path).parameters
    assert all(np.array_equal(read[name], value) for name, value in values.items())


def test_a_plain_hugging_face_configuration_is_a_text_only_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "vocab_size": 100,
                "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                "rms_norm_eps": 1e-6, "rope_theta": 5e5, "max_position_embeddings": 8192,
            }
        )
    )  # fmt: skip
    config, rope, seq_len = read_model_config(tmp_path)
    assert config.vocabulary == Vocabulary(100) and config.head_dim == 16 and config.rms_norm_eps == 1e-6
    assert rope == RopeSpec(5e5) and seq_len == 8192


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": 41}, "vocab_size is 41"),
        ({"lwm": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE of type 'dynamic'"),
        ({"lwm": None, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"lwm": None, "rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor = 0.5; expected 1 or more"),
        ({"num_key_value_heads": 3}, "not a multiple"),
    ],
)
def test_a_configuration_of_something_else_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    config = model()
    write_model_folder(tmp_path, config, ROPE, 512, arrays(config).items())
    values = json.loads((tmp_path / "config.json").read_text()) | change
    if change.get("hidden_size", 0) is None:
        del values["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_model_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_every_mismatch_is_named(tmp_path: Path) -> None:
    config = model()
    values = arrays(config)
    write_model_folder(tmp_path, config, ROPE, 512, values.items())
    values["model.norm.bias"] = values.pop("model.norm.weight")
    values["lm_head.weight"] = values["lm_head.weight"][:-1]
    save_file(values, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        read_model_folder(tmp_path)
    parts = ("1 missing: model.norm.weight", "1 unknown: model.norm.bias", "lm_head.weight is (51, 16)", "(52, 16)")
    for part in parts:
        assert part in str(caught.value)


def test_rope_in_hugging_faces_words(tmp_path: Path) -> None:
    """Llama 3.1's own configuration, as transformers wrote it before and since version 5."""
    scaling = {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }  # fmt: skip
    base = {
        "model_type": "llama", "hidden_size": 4096, "vocab_size": 128_256, "intermediate_size": 14_336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131_072,
    }  # fmt: skip
    for words in (
        {"rope_theta": 5e5, "rope_scaling": scaling},
        {"rope_parameters": {**scaling, "rope_theta": 5e5}},
    ):
        (tmp_path / "config.json").write_text(json.dumps(base | words))
        _, rope, seq_len = read_model_config(tmp_path)
        assert rope == llama3(5e5, 128, factor=8.0, original=8192) and seq_len == 131_072


def dealt(folder: Path) -> dict[str, np.ndarray]:
    """A model dealt to two files and an index, as the library's own writers do it."""
    config = model()
    values = arrays(config)
    write_model_folder(folder, config, ROPE, 512, values.items())
    (folder / "model.safetensors").unlink()
    names = sorted(values)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for part, held in parts.items():
        save_file({name: values[name] for name in held}, folder / part)
    index = {"metadata": {}, "weight_map": {name: part for part, held in parts.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return values


def test_a_model_dealt_to_several_files_is_read(tmp_path: Path) -> None:
    values = dealt(tmp_path)
    read = read_model_folder(tmp_path).parameters
    assert set(read) == set(values)
    assert all(np.array_equal(read[name], value) for name, value in values.items())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("lost", "there is no file 'model-2.safetensors' beside it"),
        ("outside", "there is no file '../model-1.safetensors' beside it"),
        ("swapped", "is in model-1.safetensors, but the index has it in model-2.safetensors"),
        ("promised", "1 promised but in none of its files: model.more.weight"),
        ("not json", "not an index"),
        ("no map", "not an index"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, damage: str, message: str) -> None:
    dealt(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    places = index["weight_map"]
    if damage == "lost":
        (tmp_path / "model-2.safetensors").unlink()
    elif damage == "outside":
        index["weight_map"] = dict.fromkeys(places, "../model-1.safetensors")
    elif damage == "swapped":
        index["weight_map"] = {name: f"model-{3 - int(part[6])}.safetensors" for name, part in places.items()}
    elif damage == "promised":
        places["model.more.weight"] = "model-1.safetensors"
    path.write_text({"not json": "{", "no map": "[]"}.get(damage, json.dumps(index)))
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        read_model_folder(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["truncated", "pickle", "empty", "missing"])
def test_a_damaged_file_is_refused_and_a_pickle_never_loaded(tmp_path: Path, damage: str) -> None:
    config = model()
    write_model_folder(tmp_path, config, ROPE, 512, arrays(config).items())
    path = tmp_path / "model.safetensors"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": path.read_bytes()[:-1], "pickle": pickle.dumps({"a": 1}), "empty": b""}[damage])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_model_folder(tmp_path)


@pytest.mark.parametrize("case", ["missing", "unknown", "twice", "shape"])
def test_writing_wrong_parameters_is_refused_and_leaves_no_model(tmp_path: Path, case: str) -> None:
    config = model()
    rows = list(arrays(config).items())
    name, value = rows[3]
    rows = {
        "missing": rows[:-1],
        "unknown": [*rows, ("model.extra", value)],
        "twice": [*rows, (name, value)],
        "shape": [*rows[:3], (name, value[:-1]), *rows[4:]],
    }[case]
    with pytest.raises(CheckpointError):
        write_model_folder(tmp_path, config, ROPE, 512, iter(rows))
    assert not (tmp_path / "model.safetensors").exists()


@settings(max_examples=40)
@given(file_bytes=st.integers(1, 40_000), dtype=st.sampled_from(["float32", "bfloat16"]), seed=st.integers(0, 99))
def test_any_size_of_files_holds_the_same(
    file_bytes: int, dtype: str, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Given in any order; read by the library itself, and no file larger than was asked but for one array alone."""
    folder, config = tmp_path_factory.mktemp("dealt"), model()
    values = arrays(config)
    order = np.random.default_rng(seed).permutation(list(values))
    write_model_folder(folder, config, ROPE, 512, ((n, values[n]) for n in order), dtype, file_bytes=file_bytes)
    target = np.dtype(np.float32) if dtype == "float32" else np.dtype(ml_dtypes.bfloat16)
    files = sorted(folder.glob("*.safetensors"))
    whole = target.itemsize * sum(value.size for value in values.values())
    assert [path.name for path in files] == (
        ["model.safetensors"] if whole <= file_bytes
        else [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    )  # fmt: skip
    found: dict[str, np.ndarray] = {}
    for path in files:
        held = load_file(path)
        size = target.itemsize * sum(value.size for value in held.values())
        assert size <= file_bytes or len(held) == 1
        assert not found.keys() & held.keys()
        found |= held
    read = read_model_folder(folder).parameters
    for name, value in values.items():
        assert np.array_equal(found[name], value.astype(target)) and np.array_equal(read[name], found[name])
    index = folder / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1)
    if index.exists():
        assert json.loads(index.read_text())["metadata"]["total_size"] == whole
    assert not list(folder.glob("*.partial"))


def test_a_model_that_another_replaces_leaves_nothing(tmp_path: Path) -> None:
    """Many files, then one, then fewer; and what breaks off leaves the earlier model as it was."""
    config = model()
    values = arrays(config)
    for size in (3_000, 10**9, 9_000):
        changed = {name: value + size for name, value in values.items()}
        write_model_folder(tmp_path, config, ROPE, 512, changed.items(), file_bytes=size)
        read = read_model_folder(tmp_path).parameters
        assert all(np.array_equal(read[name], value) for name, value in changed.items())
    files = {path.name for path in tmp_path.glob("*.safetensors")}
    assert files == set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values())
    with pytest.raises(CheckpointError, match="missing"):
        write_model_folder(tmp_path, config, ROPE, 512, list(values.items())[:-1], file_bytes=3_000)
    read = read_model_folder(tmp_path).parameters
    assert all(np.array_equal(read[name], value) for name, value in changed.items())


def test_whoever_generates_is_told_where_to_stop(tmp_path: Path) -> None:
    """Ids that are not known are null: transformers would take 1 and 2 for them otherwise."""
    config = model()
    for ids in ({"bos": 7, "eos": 9, "pad": 3, "vision_start": 5}, {"eos": [9, 8]}, {}):
        write_model_folder(tmp_path, config, ROPE, 512, arrays(config).items(), special_ids=ids)
        told = json.loads((tmp_path / "config.json").read_text())
        generation = json.loads((tmp_path / "generation_config.json").read_text())
        for role in ("bos", "eos", "pad"):
            assert told[f"{role}_token_id"] == ids.get(role) == generation.get(f"{role}_token_id")
        assert len(generation) == len(ids.keys() & {"bos", "eos", "pad"})
