"""Configuration + registry → the parts of a run, and every mistake in one go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lwm_core.config import load_config
from lwm_core.errors import ConfigError, LwmError, PluginError
from lwm_core.model import ModelConfig, canonical_shapes, preset
from lwm_core.pipeline import Pipeline, build, check_options
from lwm_core.protocols import EncoderContext, VisionEncoder
from lwm_core.registry import Registry
from lwm_core.rope import RopeSpec
from lwm_core.vocab import Vocabulary
from lwm_core.weights import write_model_folder

Write = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("standin_here")


@pytest.fixture
def made(small: Write) -> Iterator[Callable[..., Pipeline]]:
    def make(*overrides: str) -> Pipeline:
        return build(load_config(small(), overrides), Registry.from_environment())

    yield make


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(LwmError) as caught:
        build(load_config(path, overrides), Registry.from_environment())
    return str(caught.value).splitlines()


def base_folder(folder: Path, text_size: int = 259) -> ModelConfig:
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
    config = preset("tiny", Vocabulary(text_size, 12, 8), **shape)
    random = np.random.default_rng(1)
    rows = ((n, random.normal(size=s).astype(np.float32)) for n, s in canonical_shapes(config).items())
    write_model_folder(folder, config, RopeSpec(2e4), 16, rows)
    return config


def test_stages_are_taken_literally(made: Callable[..., Pipeline]) -> None:
    pipeline = made()
    short, long = pipeline.stages
    assert (short.name, short.seq_len, short.rope.theta, short.steps, short.rows) == ("short", 32, 1e4, 10, 2)
    assert (long.rope.theta, long.min_lr, long.lr_schedule) == (4e4, 0.1, "cosine")
    assert pipeline.model.vocabulary == Vocabulary(259)


def test_a_schedule_comes_from_a_context_plugin(tmp_path: Path, small: Write) -> None:
    text = small().read_text()
    head, tail = text.split("[[stages]]", 1)[0], text[text.index("[samples]") :]
    path = tmp_path / "context.toml"
    path.write_text(head + "context = { name = 'doubling', first = 16, stages = 3 }\n" + tail)
    pipeline = build(load_config(path), Registry.from_environment())
    assert [(s.name, s.seq_len) for s in pipeline.stages] == [("x16", 16), ("x32", 32), ("x64", 64)]


def test_every_mistake_in_every_table_is_told_at_once(tmp_path: Path, small: Write) -> None:
    path = small(trainer="step_second = 1, devices = 0", evals='{name = "tally", samples = "many"}')
    text = path.read_text().replace('path = "shipped:genesis"', "path = 3, heldout = 0.5")
    path.write_text(text.replace('attention = { name = "standin" }', 'attention = { name = "standing" }'))
    found = problems(path)
    lines = {n: line for n, line in enumerate(text.splitlines(), 1)}
    for part, key in (
        ("trainer.step_second: unknown option of 'standin' (lwm-standin 0.1.0); did you mean step_seconds?", "trainer"),
        ("trainer.devices: expected a number greater than 0, got 0", "trainer"),
        ("attention.name: attention 'standing' is unknown; did you mean 'standin'?", "attention"),
        ("data.path: expected a text, got 3", "data"),
        ("data.heldout: unknown option of 'text-file'", "data"),
        ("evals.0.samples: expected a whole number, got 'many'", "evals"),
    ):
        [line] = [one for one in found if part in one]
        number = int(line.removeprefix(f"{path}:").partition(":")[0])
        assert lines[number].startswith(key), line
    assert len(found) == 6


def test_all_missing_plugins_are_one_line_that_can_be_pasted(small: Write) -> None:
    registry = Registry(found=[c for c in Registry().candidates() if c.dist == "lwm-core"])
    path = small(evals='{name = "needle"}')
    loaded = load_config(path, ["data.name=mix", "init=tiny-base", "trainer.name=auto", "attention.name=auto"])
    with pytest.raises(PluginError) as caught:
        check_options(loaded, registry)
    expected = "pip install lwm-tiny-base lwm-jax-ring lwm-data lwm-evals"
    assert str(caught.value) == f"{path} needs plugins that are not installed: {expected}"
    with pytest.raises(ConfigError) as both:
        check_options(load_config(path, ["data.name=mix", "trainer.name=auto", "model.preset=big"]), registry)
    assert ["big" in line for line in both.value.problems] == [True, False, False]
    assert "attention 'standin' is unknown" in both.value.problems[1]
    assert both.value.problems[2].endswith("pip install lwm-jax-ring lwm-data lwm-evals")


def test_an_attention_of_another_framework_than_the_trainers_is_refused(small: Write) -> None:
    path = small()
    [line] = problems(path, "trainer.name=framed", "attention.name=foreign")
    assert "attention 'foreign' (lwm-standin 0.1.0) does not fit: is for torch, not jax" in line


def test_auto_takes_what_fits_and_says_why_not_the_others(made: Callable[..., Pipeline]) -> None:
    chosen = made("trainer.name=framed", "attention.name=auto").selection.attention
    assert chosen.asked == "auto" and chosen.name == "standin"
    assert ("foreign", "is for torch, not jax") in chosen.choice.rejected


def test_a_trainer_chosen_by_auto_fits_the_attention_that_is_named(made: Callable[..., Pipeline]) -> None:
    chosen = made("trainer.name=auto", "attention.name=foreign").selection.trainer
    assert chosen.name == "standin"
    assert any(name == "framed" and "is for jax" in reason for name, reason in chosen.choice.rejected)


def test_an_encoder_is_made_in_the_trainers_framework(made: Callable[..., Pipeline]) -> None:
    pipeline = made("trainer.name=framed", "encoder={name='patches', codes=16}", "model.vision_size=8448")
    encoder: Any = pipeline.make_encoder()
    assert isinstance(encoder, VisionEncoder) and encoder.codes == 16
    assert encoder.context == EncoderContext("jax", Path("."))
    assert encoder.encode(np.full((2, 16, 16, 3), 255, np.uint8)).tolist() == [[15], [15]]
    assert "patches" in [one.name for one in pipeline.selection.plugged]
    assert made().make_encoder() is None


def test_an_encoder_chosen_by_auto_brings_no_second_framework(made: Callable[..., Pipeline]) -> None:
    def chosen(trainer: str, name: str) -> str:
        selection = made(f"trainer.name={trainer}", f"encoder.name={name}").selection
        assert selection.encoder is not None
        return selection.encoder.name

    assert chosen("framed", "auto") == "patches"  # the other is of more priority, and for torch
    assert chosen("standin", "auto") == "torch-patches"
    assert chosen("framed", "torch-patches") == "torch-patches"


def test_an_encoder_needs_ids_for_its_codes(small: Write, made: Callable[..., Pipeline]) -> None:
    pipeline = made("encoder.name=patches")
    with pytest.raises(ConfigError, match="encoder 'patches' has 256 codes, but the model has ids for 0; set "):
        pipeline.make_encoder()
    [line] = problems(small(), "encoder={name='patches', code=3}")
    assert "encoder.code: unknown option of 'patches' (lwm-standin 0.1.0); did you mean codes?" in line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.preset=huge", "unknown preset 'huge'; expected one of debug, tiny"),
        ("model.num_kv_heads=3", "num_heads = 2 is not a multiple of num_kv_heads = 3"),
        ("model.vision_size=5", "vision_size is 5"),
        ("stages.0.name=base", "cannot be called 'base'"),
        ("stages.1.name=short", "stages 1 and 2 are both called 'short'"),
        ("init=./nowhere", "nowhere is not a model folder"),
        ("init=nowhere", "weights 'nowhere' is unknown"),
    ],
)
def test_what_does_not_fit_together_is_one_line(small: Write, override: str, message: str) -> None:
    [line] = problems(small(), override)
    assert message in line and override.partition("=")[0].rpartition(".")[0] in line


@pytest.mark.parametrize("as_plugin", [True, False])
def test_a_run_may_start_from_a_model(
    tmp_path: Path, small: Write, monkeypatch: pytest.MonkeyPatch, as_plugin: bool
) -> None:
    config = base_folder(tmp_path / "base")
    monkeypatch.setenv("STANDIN_BASE", str(tmp_path / "base"))
    init = "standin-base" if as_plugin else str(tmp_path / "base")
    pipeline = build(load_config(small(), [f"init={init}"]), Registry.from_environment())
    assert (pipeline.model, pipeline.start.seq_len, pipeline.start.rope) == (config, 16, RopeSpec(2e4))
    assert pipeline.selection.tokenizer.name == "bytes"
    base = pipeline.base_stage()
    assert (base.name, base.seq_len, base.rope, base.rows) == ("base", 16, RopeSpec(2e4), 2)


def test_a_model_table_that_differs_from_the_starting_model_is_refused(tmp_path: Path, small: Write) -> None:
    base_folder(tmp_path / "base")
    found = problems(small(), f"init={tmp_path}/base", "model.num_layers=2", "model.vision_size=8448")
    assert len(found) == 2
    assert "num_layers = 2" in found[0] and "has 1; leave [model] out" in found[0]
    assert "vision_size = 8448" in found[1] and "has 12" in found[1]


def test_a_tokenizer_too_large_for_the_starting_model_is_refused(tmp_path: Path, small: Write) -> None:
    base_folder(tmp_path / "base", text_size=200)
    [line] = problems(small(), f"init={tmp_path}/base")
    assert "the tokenizer has 259 ids" in line and "rows for 200" in line


def test_stages_are_held_against_the_devices(made: Callable[..., Pipeline]) -> None:
    made("stages.0.mesh=1,1,1,4", "stages.1.mesh=2,1,1,-1").check_stages(4)
    with pytest.raises(ConfigError) as caught:
        made("stages.0.mesh=1,1,1,3", "stages.1.mesh=4,1,1,-1").check_stages(4)
    first, second = caught.value.problems
    assert first.startswith("-s stages.0.mesh") and "needs 3 devices, but 4 are here" in first
    assert "stages.1.batch_tokens" in second and "do not divide over dp × fsdp = 4" in second
    with pytest.raises(ConfigError, match="sequence length 32 is not a multiple of 10; use 30"):
        made().check_stages(5)


def test_options_that_do_not_survive_json_are_refused_before_the_run(
    made: Callable[..., Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lwm_core.run.facts import resolved

    pipeline = made()
    assert resolved(pipeline)["trainer"]["devices"] == 1
    options: Any = pipeline.selection.trainer.options
    monkeypatch.setattr(type(options), "model_dump", lambda self, **how: {"devices": 2})
    with pytest.raises(PluginError, match="must round-trip"):
        resolved(pipeline)
