"""What suites are told and how the encoder comes to them: once, where one is needed, on rank 0; else one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lwm_core.config import load_config
from lwm_core.errors import ConfigError, LwmError
from lwm_core.pipeline import Pipeline, build
from lwm_core.protocols import EvalContext, EvalSetup
from lwm_core.registry import Registry
from lwm_core.run import run
from lwm_core.run.suites import Suites

Write = Callable[..., Path]

ENCODER = "encoder={name='patches', codes=16}"
VISION = "model.vision_size=8448"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The encoders that pipelines have made in this process."""
    found: list[Any] = []
    make = Pipeline.make_encoder

    def counted(self: Pipeline) -> Any:
        found.append(make(self))
        return found[-1]

    monkeypatch.setattr(Pipeline, "make_encoder", counted)
    return found


def refused(path: Path, *overrides: str) -> str:
    """The one line with which a run is refused, before anything is written."""
    out = path.parent / "refused"
    with pytest.raises(LwmError) as caught:
        run(load_config(path, overrides), out)
    assert "\n" not in str(caught.value) and not out.exists()
    return str(caught.value)


def test_the_encoder_is_made_once_for_all_suites_and_stages(
    tmp_path: Path, small: Write, standin_here: Any, made: list[Any]
) -> None:
    path = small(evals='{name = "glance"}, {name = "tally"}, {name = "glance"}', trainer="devices = 1")
    run(load_config(path, [ENCODER, VISION, "trainer.name=framed"]), tmp_path / "r")
    [encoder] = made
    assert encoder.context.framework == "jax"
    for name in ("glance", "glance-2"):
        rows = json.loads((tmp_path / "r" / "evals" / f"{name}.json").read_text())["rows"]
        expected = {"code": 259 + 15, "who": id(encoder)}
        assert rows == [{"stage": "short", **expected}, {"stage": "long", **expected}]


def test_no_encoder_is_made_where_none_is_needed(
    tmp_path: Path, small: Write, standin_here: Any, made: list[Any]
) -> None:
    run(load_config(small(evals='{name = "tally"}'), [ENCODER, VISION]), tmp_path / "r")
    assert made == []


def test_a_suite_that_needs_no_encoder_sees_none(small: Write, standin_here: Any) -> None:
    evals = '{name = "glance"}, {name = "tally"}'
    pipeline = build(load_config(small(evals=evals), [ENCODER, VISION]), Registry.from_environment())
    suites = Suites(pipeline, pipeline.make_data())
    trainer = pipeline.make_trainer()
    trainer.begin_stage(pipeline.stages[0])
    glance, tally = (suites.context(name, trainer, "short", Path("x"), print) for name in ("glance", "tally"))
    assert glance.encoder is not None and tally.encoder is None
    assert isinstance(glance, EvalContext) and isinstance(glance, EvalSetup)
    assert (glance.vocabulary, glance.stage, glance.out) == (pipeline.model.vocabulary, "short", Path("x"))
    assert glance.stages == pipeline.stages and glance.trained_codes == {}
    assert glance.held_out() == tally.held_out() != []


def test_a_suite_without_the_encoder_it_needs_is_refused_with_what_to_write(small: Write, standin_here: Any) -> None:
    path = small(evals='{name = "tally"}, {name = "glance"}')
    line = 1 + path.read_text().splitlines().index('evals = [{name = "tally"}, {name = "glance"}]')
    assert refused(path) == (
        f"{path}:{line}: evals.1.name: eval 'glance' needs a vision encoder, and none is named; "
        'write encoder = { name = "auto" }'
    )
    said = refused(path, 'encoder = { name = "auto" }')
    assert "has 256 codes, but the model has ids for 0; set model.vision_size" in said


def test_what_a_suite_refuses_is_told_with_its_place_before_the_first_step(small: Write, standin_here: Any) -> None:
    path = small(evals='{name = "glance", refuse = "it is dark"}')
    said = refused(path, ENCODER, VISION)
    assert said.startswith(f"{path}:") and said.endswith(": glance: it is dark")


def test_codes_of_another_encoder_than_the_one_that_is_named_are_refused(
    tmp_path: Path, small: Write, standin_here: Any, made: list[Any]
) -> None:
    path = small()
    path.write_text(path.read_text().replace('name = "text-file", path = "shipped:genesis"', 'name = "coded"'))
    other = f"data.checksum={'ab' * 32}"
    said = refused(path, ENCODER, VISION, other)
    assert (
        "encoder 'patches' has the weights 000000000000, but the codes of data source 'clips' were made by "
        "lwm-standin:patches with abababababab; name that encoder" in said
    )
    run(load_config(path, [VISION, other]), tmp_path / "none")  # where no encoder is named there is nothing to hold
    run(load_config(path, [ENCODER, VISION]), tmp_path / "same")
    assert len(made) == 3 and made[1] is None and made[2].checksum == "0" * 64


def test_evaluating_again_holds_only_what_the_chosen_suite_needs(lwm: Any, small: Write) -> None:
    path = small(evals='{name = "glance"}, {name = "tally"}')
    path.write_text(path.read_text().replace('name = "text-file", path = "shipped:genesis"', 'name = "coded"'))
    assert lwm("run", str(path), "--out", "r", "-s", ENCODER, "-s", VISION).returncode == 0
    done = lwm("eval", "r", "--json", "--quiet", "--suite", "glance")
    assert json.loads(done.stdout)["glance"][0]["code"] == 274, done.stderr
    described = json.loads((lwm.cwd / "r" / "run.json").read_text())
    described["config"]["data"]["checksum"] = "ab" * 32
    (lwm.cwd / "r" / "run.json").write_text(json.dumps(described))
    assert lwm("eval", "r", "--suite", "tally").returncode == 0
    done = lwm("eval", "r", "--quiet", "--suite", "glance")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "with abababababab" in done.stderr


def test_of_several_processes_only_rank_0_makes_the_encoder(together_run: Any, small: Write) -> None:
    prelude = """
from lwm_core.pipeline import Pipeline
make = Pipeline.make_encoder
def told(self):
    sys.stderr.write(f"rank {rank} makes it\\n")
    return make(self)
Pipeline.make_encoder = told
"""
    words = ("run", str(small(evals='{name = "glance"}')), "-s", ENCODER, "-s")
    ended = together_run(2, *words, VISION, "--out", "r", prelude=prelude)
    assert [one.code for one in ended] == [0, 0], ended
    assert ended[0].err.count("makes it") == 1 and ended[1].err == ""
    rows = json.loads((together_run.cwd / "r" / "evals" / "glance.json").read_text())["rows"]
    assert [row["code"] for row in rows] == [274, 274]
    ended = together_run(2, *words, "model.vision_size=0", "--out", "q", prelude=prelude)
    assert [one.code for one in ended] == [2, 2], ended
    assert "the model has ids for 0" in ended[0].err and ended[1].err == ""


def test_a_missing_encoder_is_a_mistake_of_the_configuration(small: Write, standin_here: Any) -> None:
    """``lwm config validate`` finds it too: it needs no model and no encoder."""
    from lwm_core.pipeline import check_options

    with pytest.raises(ConfigError, match="needs a vision encoder"):
        check_options(load_config(small(evals='{name = "glance"}')))
