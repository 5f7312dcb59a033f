"""The shipped weights: a whole model, small, tied, with a tokenizer that fits it; and the script that made them."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from lwm_core.protocols import WeightsBundle
from lwm_core.registry import Registry
from lwm_core.testing import PluginSuite, WeightsSuite
from lwm_core.weights import read_model_folder, write_model_folder
from lwm_tiny_base.bundle import tiny_base

MAKE, CLIPS = (Path(__file__).parents[1] / name for name in ("make.py", "clips.py"))


class TestPlugin(PluginSuite):
    kind = "weights"
    name = "tiny-base"


class TestWeights(WeightsSuite):
    def make(self) -> WeightsBundle:
        return tiny_base()


def test_the_registry_finds_it() -> None:
    assert Registry.from_environment().load("weights", "tiny-base")().folder == tiny_base().folder


def test_shape_size_and_type() -> None:
    folder = tiny_base().folder
    found = read_model_folder(folder)
    assert (found.model.vocabulary.text_size, found.model.vocabulary.vision_size) == (4096, 8448)
    assert found.model.tie_embeddings and "lm_head.weight" not in found.parameters
    assert found.seq_len == 2048
    assert {array.dtype for array in found.parameters.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert (folder / "model.safetensors").stat().st_size <= 16 * 2**20


def test_its_tokenizer_has_single_digits_and_the_models_ids() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny_base().folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 4096
    text = "And the number is 1234567."
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("1234567").ids) == 7


def make(*arguments: Path | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(MAKE), *map(str, arguments)], capture_output=True, text=True)


def test_make_packs_a_run(tmp_path: Path) -> None:
    source = read_model_folder(tiny_base().folder)
    wide = {name: np.asarray(array).astype(np.float32) for name, array in source.parameters.items()}
    run = tmp_path / "run"
    write_model_folder(run / "model", source.model, source.rope, source.seq_len, wide.items())
    (run / "model" / "tokenizer.json").write_text("{}")
    done = make(run, "--out", tmp_path / "packed")
    assert done.returncode == 0, done.stderr
    packed = read_model_folder(tmp_path / "packed")
    assert packed.model == source.model and packed.rope == source.rope
    for name, array in packed.parameters.items():
        assert np.array_equal(array, source.parameters[name]), name
    assert json.loads((tmp_path / "packed" / "tokenizer.json").read_text()) == {}


def test_make_tells_what_is_missing(tmp_path: Path) -> None:
    done = make(tmp_path, "--out", tmp_path / "packed")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "config.json" in done.stderr


def test_clips_are_cut_and_encoded(tmp_path: Path) -> None:
    """Twelve frames each, no two clips alike, and the same ones again from the same seed."""
    for needed in ("av", "flax", "lwm_vqgan"):
        pytest.importorskip(needed)
    from lwm_core.shards import open_shards

    made = []
    for name in ("one", "two"):
        done = subprocess.run(
            [sys.executable, str(CLIPS), str(tmp_path / name), "--clips", "3"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        shards = open_shards(tmp_path / name / "codes")
        assert [video.frames for video in shards.videos] == [12] * 3
        made.append(np.stack([shards.codes(video) for video in range(3)]))
    assert np.array_equal(*made) and made[0].shape == (3, 12, 256)
    assert len({clip.tobytes() for clip in made[0]}) == 3


@pytest.mark.parametrize("name", ["quickstart", "tiny-base-vision"])
def test_no_recipe_trains_on_what_it_judges(name: str) -> None:
    """The end of the clip that is cut up here is the end that the recipes hold out, and what they judge lies in it."""
    pytest.importorskip("av")
    recipe = tomllib.loads((files("lwm_core") / "recipes" / f"{name}.toml").read_text())
    held_out = recipe["data"]["sources"]["clip"]["held_out_frames"]
    assert runpy.run_path(str(CLIPS))["TRAINED"] == 132 - held_out
    [judged] = [one for one in recipe["evals"] if one["name"] == "video-continuation"]
    assert judged["given"] + judged["frames"] <= held_out and not {"at", "every"} & judged.keys()


def test_clips_are_never_written_over(tmp_path: Path) -> None:
    pytest.importorskip("av")
    (tmp_path / "videos").mkdir()
    done = subprocess.run([sys.executable, str(CLIPS), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "name another folder" in done.stderr
