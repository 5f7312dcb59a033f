"""``lwm config`` and ``lwm recipes``."""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lwm_core.cli import config as config_verb
from lwm_core.cli import recipes as recipes_verb
from lwm_core.config import load_config, read
from lwm_core.errors import ConfigError, UsageError

TEXT = """\
extends = ["base.toml"]
name = "x"
[attention]
name = "jax-ring"
layout = "zigzag"
"""
BASE = """\
[data]
name = "text"
[[stages]]
seq_len = 256
tokens = 1000
batch_tokens = 512
lr = 1e-3
"""


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("exp.toml").write_text(TEXT, encoding="utf-8")
    Path("base.toml").write_text(BASE, encoding="utf-8")


def lwm(*words: str) -> int:
    parser = argparse.ArgumentParser(prog="lwm")
    verbs = parser.add_subparsers()
    config_verb.add_parser(verbs)
    recipes_verb.add_parser(verbs)
    args = parser.parse_args(words)
    result = args.run(args)
    assert isinstance(result, int)
    return result


def test_show_is_a_configuration_that_comes_to_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in ([], ["--origin"], ["--defaults"], ["--defaults", "--origin"]):
        assert lwm("config", "show", "exp.toml", "-s", "seed=3", *flags) == 0
        text = capsys.readouterr().out
        Path("shown.toml").write_text(text, encoding="utf-8")
        assert load_config("shown.toml").config == load_config("exp.toml", ["seed=3"]).config
        assert ("log_every" in text) == ("--defaults" in flags)


def test_show_origins(capsys: pytest.CaptureFixture[str]) -> None:
    lwm("config", "show", "exp.toml", "--origin", "--defaults", "-s", "run.log_every=2")
    lines = capsys.readouterr().out.splitlines()
    assert 'layout = "zigzag"  # exp.toml:5' in lines
    assert "seq_len = 256  # base.toml:4" in lines
    assert "log_every = 2  # -s run.log_every=2" in lines
    assert "checkpoint_every = 100  # default" in lines


def test_show_json_and_notes(capsys: pytest.CaptureFixture[str]) -> None:
    lwm("config", "show", "exp.toml", "--json", "-s", "attention.name=torch-ring")
    shown = json.loads(capsys.readouterr().out)
    assert shown["source"] == "exp.toml" and shown["config"]["attention"] == {"name": "torch-ring"}
    assert shown["origins"]["attention.name"] == "-s attention.name=torch-ring"
    assert shown["origins"]["stages.0.lr"] == "base.toml:7"
    (note,) = shown["notes"]
    lwm("config", "show", "exp.toml", "-s", "attention.name=torch-ring")
    captured = capsys.readouterr()
    assert captured.err == f"note: {note}\n" and "layout" not in tomllib.loads(captured.out)["attention"]


def test_validate_checks_the_plugins_options_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def check_options(loaded: Any) -> None:
        if loaded.config.attention.options:
            raise ConfigError(["exp.toml:5: attention.layout: one", "two"])

    pipeline = ModuleType("lwm_core.pipeline")
    pipeline.check_options = check_options  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lwm_core.pipeline", pipeline)
    with pytest.raises(ConfigError, match="layout: one") as caught:
        lwm("config", "validate", "exp.toml")
    assert caught.value.exit_code == 2
    assert lwm("config", "validate", "exp.toml", "--json") == 2
    assert json.loads(capsys.readouterr().out) == {
        "source": "exp.toml", "valid": False, "problems": ["exp.toml:5: attention.layout: one", "two"], "notes": [],
    }  # fmt: skip
    assert lwm("config", "validate", "base.toml") == 0
    assert capsys.readouterr().out == "base.toml: valid\n"
    assert lwm("config", "validate", "base.toml", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"source": "base.toml", "valid": True, "problems": [], "notes": []}


def test_validate_tells_the_envelopes_mistakes() -> None:
    with pytest.raises(ConfigError) as caught:
        lwm("config", "validate", "exp.toml", "-s", "sed=1", "-s", "stages.0.lr=fast")
    assert caught.value.problems == [
        "-s stages.0.lr=fast: expected a number, got 'fast'",
        "-s sed=1: unknown key; did you mean seed?",
    ]
    with pytest.raises(UsageError, match="no such file"):
        lwm("config", "validate", "nope.toml")


def test_diff(capsys: pytest.CaptureFixture[str]) -> None:
    Path("other.toml").write_text(
        'extends = ["exp.toml"]\nseed = 0\n[attention]\nwindow = 8\n[run]\nlog_every = 5\n[optimizer]\nbeta1 = 0.9\n',
        encoding="utf-8",
    )
    assert lwm("config", "diff", "exp.toml", "other.toml") == 0
    assert capsys.readouterr().out.splitlines() == [
        "- run.log_every = 10  # default",
        "+ run.log_every = 5  # other.toml:6",
        "+ attention.window = 8  # other.toml:4",
    ]
    assert lwm("config", "diff", "exp.toml", "other.toml", "--json") == 0
    assert json.loads(capsys.readouterr().out)[1] == {
        "key": "attention.window", "a": None, "b": 8, "a_origin": None, "b_origin": "other.toml:4",
    }  # fmt: skip
    assert lwm("config", "diff", "exp.toml", "exp.toml") == 0
    assert capsys.readouterr().out == ""


def references(schema: Any) -> set[str]:
    if isinstance(schema, dict):
        own = {schema["$ref"]} if isinstance(schema.get("$ref"), str) else set()
        return own.union(*(references(value) for value in schema.values()))
    return set().union(*(references(item) for item in schema)) if isinstance(schema, list) else set()


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert lwm("config", "schema") == 0
    schema = json.loads(capsys.readouterr().out)
    assert {reference.removeprefix("#/$defs/") for reference in references(schema)} <= set(schema["$defs"])
    assert schema["properties"]["attention"]["$ref"] == "#/$defs/attention.table"
    assert schema["properties"]["evals"]["items"] == {"$ref": "#/$defs/eval.table"}
    assert schema["additionalProperties"] is False and "extends" in schema["properties"]
    assert {"name": {"const": "auto"}} in [one["properties"] for one in schema["$defs"]["attention.table"]["oneOf"]]


def test_recipes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path("recipes")
    folder.mkdir()
    (folder / "one.toml").write_text('summary = "the first"\n', encoding="utf-8")
    (folder / "longer.toml").write_text('extends = ["one"]\nseed = 1\n', encoding="utf-8")
    monkeypatch.setattr(read, "recipes_folder", lambda: folder)
    assert lwm("recipes") == 0
    assert capsys.readouterr().out == "longer  the first\none     the first\n"
    assert lwm("recipes", "--json") == 0
    assert json.loads(capsys.readouterr().out)[1] == {"name": "one", "summary": "the first"}


def test_the_shipped_recipes_are_right() -> None:
    for name in read.recipe_names():
        assert load_config(name).config.summary, f"recipe {name} has no summary"
