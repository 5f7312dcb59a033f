"""``lwm import`` against files as flax, msgpack, safetensors and torch themselves write them.

Shapes: L layers, E hidden size, F feed-forward size, H query heads, K key-value heads, D head dim, V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_cases import THETA, arrays, as_lwm, model, write_stream
from hypothesis import given, settings
from hypothesis import strategies as st

from lwm_core.cli import main
from lwm_core.errors import CheckpointError
from lwm_core.rope import RopeSpec
from lwm_core.weights import CONFIG_FILE, read_model_folder, write_model_folder
from lwm_hf.interchange.lwm_model import as_pairs
from lwm_hf.interchange.stream_file import StoredArray, read_stream

msgpack = pytest.importorskip("msgpack")
pytest.importorskip("flax")
from flax import serialization  # noqa: E402 - not before it is known to be there


@pytest.mark.parametrize("vision", [0, 8448])
@pytest.mark.parametrize("chunk", [2**30, 1000])
def test_lwms_stream_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vision: int, chunk: int) -> None:
    """Every parameter, whether arrays lie in one piece or, as flax does beyond a size, in several."""
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", chunk)
    config = model(vision)
    values = arrays(config)
    write_stream(tmp_path / "params", as_lwm(config, values))
    assert main(["import", str(tmp_path / "params"), str(tmp_path / "out"), "--dtype", "float32", *THETA]) == 0
    read = read_model_folder(tmp_path / "out")
    assert (read.model, read.rope, read.seq_len) == (config, RopeSpec(5e7), 4096)
    for name, value in values.items():
        assert np.array_equal(read.parameters[name], value), name


def test_of_a_training_state_the_parameters_are_taken(tmp_path: Path) -> None:
    config = model()
    values = arrays(config)
    rows = as_lwm(config, values)
    moments = {("opt_state", "mu", *key[1:]): -value for key, value in rows.items()}
    state = {("step",): 7, **moments, **{("params", *key): value for key, value in rows.items()}}
    write_stream(tmp_path / "state", state)
    assert main(["import", str(tmp_path / "state"), str(tmp_path / "out"), "--dtype", "float32", *THETA]) == 0
    read = read_model_folder(tmp_path / "out").parameters
    assert all(np.array_equal(read[name], value) for name, value in values.items())


@settings(max_examples=50, deadline=None)
@given(heads=st.integers(1, 4), pairs=st.integers(1, 8), seed=st.integers(0, 99), position=st.integers(0, 10_000))
def test_halves_rotate_as_pairs_did(heads: int, pairs: int, seed: int, position: int) -> None:
    """Rotating interleaved pairs is rotating halves of the same weight, written in the order of its pairs."""
    random = np.random.default_rng(seed)
    dim = 2 * pairs
    weight, x = random.normal(size=(heads * dim, 5)), random.normal(size=5)
    angle = position * 10_000.0 ** (-np.arange(pairs) * 2 / dim)
    turned = ((weight @ x).reshape(heads, pairs, 2) @ [1, 1j]) * np.exp(1j * angle)
    canonical = np.empty_like(weight)
    as_pairs(canonical, heads)[...] = weight.reshape(heads, pairs, 2, 5)
    first, second = np.split((canonical @ x).reshape(heads, dim), 2, axis=1)
    np.testing.assert_allclose(first * np.cos(angle) - second * np.sin(angle), turned.real, atol=1e-12)
    np.testing.assert_allclose(second * np.cos(angle) + first * np.sin(angle), turned.imag, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    kind=st.sampled_from(["float32", "float16", "bfloat16"]), chunk=st.integers(8, 5000), data=st.data(),
)  # fmt: skip
def test_any_rows_of_any_array(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], kind: str, chunk: int, data: Any
) -> None:
    """Against flax's own reading of the same bytes."""
    import jax.numpy as jnp

    path = tmp_path_factory.mktemp("stream") / "params"
    array = np.random.default_rng(1).normal(size=shape).astype(jnp.dtype(kind))
    start = data.draw(st.integers(0, shape[0]))
    stop = data.draw(st.integers(start, shape[0]))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(serialization, "MAX_CHUNK_SIZE", chunk)
        write_stream(path, {("params", "a", "b"): array, ("params", "c"): array})
    found = read_stream(path)
    assert set(found) == {("a", "b"), ("c",)}
    assert np.array_equal(found["c",].rows(start, stop), array[start:stop])
    assert found["c",].dtype == array.dtype


def test_a_stream_that_is_cut_off_or_changed_is_refused(tmp_path: Path) -> None:
    """At every length, and with any byte of the front changed: one line, or what it says, but nothing else."""
    path = tmp_path / "params"
    write_stream(path, {("params", "a"): np.zeros(3, np.float32), ("params", "b"): np.zeros((2, 2), np.float32)})
    whole = path.read_bytes()
    first = len(msgpack.packb((("params", "a"), serialization.to_bytes(np.zeros(3, np.float32)))))
    for size in set(range(1, len(whole))) - {first}:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            read_stream(path)
    random = np.random.default_rng(0)
    for at in range(len(whole)):
        for value in random.integers(0, 256, 6):
            path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            try:
                assert all(isinstance(one, StoredArray) for one in read_stream(path).values())
            except CheckpointError as error:
                assert "\n" not in str(error)


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """/dev/full takes no byte: the folder that was begun is taken back."""
    config = model()
    write_stream(tmp_path / "params", as_lwm(config, arrays(config)))
    real = Path.open

    def opened(path: Path, *mode: Any, **options: Any) -> Any:
        return real(Path("/dev/full") if path.suffix == ".partial" else path, *mode, **options)

    monkeypatch.setattr(Path, "open", opened)
    assert main(["import", str(tmp_path / "params"), str(tmp_path / "out"), *THETA]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "cannot be written" in told and not (tmp_path / "out").exists()


def test_new_rows_for_vision_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = model()
    values = arrays(config)
    write_model_folder(tmp_path / "text", config, RopeSpec(), 512, values.items())
    assert main(["import", str(tmp_path / "text"), str(tmp_path / "out"), "--vision-size", "8448"]) == 0
    told = capsys.readouterr().out
    assert "rows 70 to 8517 of model.embed_tokens.weight and lm_head.weight" in told and "no tokenizer" in told
    read = read_model_folder(tmp_path / "out")
    assert read.model == model(8448)
    table = np.asarray(read.parameters["lm_head.weight"], np.float32)
    assert np.allclose(table[:70], values["lm_head.weight"], rtol=1e-2)
    assert abs(table[70:].std() / config.init_std - 1) < 0.01


def test_torchs_bins_are_read_as_tensors_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    config = model()
    values = arrays(config)
    write_model_folder(tmp_path / "bins", config, RopeSpec(1e6), 512, values.items())
    (tmp_path / "bins" / "model.safetensors").unlink()
    names = sorted(values)
    parts = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for part, held in parts.items():
        torch.save({name: torch.from_numpy(values[name]) for name in held}, tmp_path / "bins" / part)
    index = {"weight_map": {name: part for part, held in parts.items() for name in held}}
    (tmp_path / "bins" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert main(["import", str(tmp_path / "bins"), str(tmp_path / "out"), "--dtype", "float32"]) == 0
    read = read_model_folder(tmp_path / "out").parameters
    assert all(np.array_equal(read[name], value) for name, value in values.items())
    torch.save({"a": main}, tmp_path / "bins" / "pytorch_model-1.bin")
    assert main(["import", str(tmp_path / "bins"), str(tmp_path / "again")]) == 1
    assert "cannot be read as tensors alone" in capsys.readouterr().err and not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nothing", "out"), "there is no such file or folder"),
        (("params", "out"), "set --theta and --seq-len"),
        (("params", "out", *THETA[:4], "--heads", "7"), "do not divide into 7 heads; set --heads"),
        (("params", "full", *THETA), "exists already; nothing is written over"),
        (("full", "out"), "no model.safetensors"),
        (("text", "out"), "not LWM's stream of parameters"),
        (("part", "out", *THETA), "there is no transformer/h/scan_decoder/feed_forward/w1/kernel"),
        (("params", "out", *THETA, "--tokenizer", "nowhere"), "--tokenizer nowhere: there is no such folder"),
    ],
)
def test_wrong_use_is_one_line_and_leaves_nothing(
    words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    config = model()
    rows = as_lwm(config, arrays(config))
    write_stream(Path("params"), rows)
    write_stream(Path("part"), {key: value for key, value in rows.items() if "w1" not in key})
    Path("text").write_text("{}")
    Path("full").mkdir()
    Path("full", "kept").touch()
    assert main(["import", *words]) in (1, 2)
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert not Path("out", CONFIG_FILE).exists() and Path("full", "kept").exists()
