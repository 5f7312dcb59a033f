"""Mistakes as one line each, with the file and line that made them, all at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

import lwm_core
from lwm_core.config import problems_from
from lwm_core.config.document import Document, Origin, Origins, walk
from lwm_core.config.load import load_config, plugin_tables
from lwm_core.config.override import apply_overrides
from lwm_core.config.read import read_source
from lwm_core.errors import ConfigError

STAGE = "[[stages]]\nseq_len = 256\ntokens = 1000\nbatch_tokens = 512\nlr = 1e-3\n"
GOOD = f'name = "x"\n[data]\nname = "text"\n{STAGE}'


class Kernel(BaseModel):
    model_config = ConfigDict(extra="forbid")
    block_size: int = Field(128, gt=0)
    kind: Literal["xla", "pallas"] = "xla"


class Ring(BaseModel):
    model_config = ConfigDict(extra="forbid")
    block_size: int = 1
    lr: float = 0.1
    on: bool = False
    paths: str | list[str] = "a"
    kernel: Kernel | str = "xla"
    named: dict[str, Kernel] = {}
    many: list[Kernel] = []
    limited: Annotated[list[int], Field(max_length=2)] = []
    width: int = Field(1, alias="q-width")
    needed: str = Field("", description="what it is")
    even: int = 0

    @field_validator("even")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError(f"{value} is odd;\nwrite an even number")
        return value


class Prose(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["text"]
    path: str


class Echo(BaseModel):
    """Has a key that is called as its neighbour's kind is."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["copy"]
    text: int = Field(1, gt=0)


class Tagged(BaseModel):
    model_config = ConfigDict(extra="forbid")
    sources: dict[str, Annotated[Prose | Echo, Field(discriminator="kind")]]


class Needy(BaseModel):
    model_config = ConfigDict(extra="forbid")
    must: int = Field(description="how many")


def options(text: str, tmp_path: Path, overrides: tuple[str, ...] = (), model: type[BaseModel] = Ring) -> list[str]:
    """The problems of the table [attention] of a file, as the second pass has them."""
    (tmp_path / "exp.toml").write_text("\n\n[attention]\n" + text, encoding="utf-8")
    document = read_source(tmp_path / "exp.toml")
    document, none = apply_overrides(document, overrides, lambda path: False)
    assert none == []
    with pytest.raises(ValidationError) as caught:
        model.model_validate(document.data["attention"])
    found = problems_from(
        caught.value, model, document.origins, prefix=("attention",), owner="'jax-ring' (lwm-jax-ring 1.2)"
    )
    return [line.replace(f"{tmp_path}/", "") for line in found]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("blok_size = 1", "blok_size: unknown option of 'jax-ring' (lwm-jax-ring 1.2); did you mean block_size?"),
        ("block-size = 1", "block-size: unknown option of 'jax-ring' (lwm-jax-ring 1.2); did you mean block_size?"),
        ("zzz = 1", "zzz: unknown option of 'jax-ring' (lwm-jax-ring 1.2); known: block_size, lr, on, paths, kernel, "
                    "named, many, limited, q-width, needed, even"),
        ("kernel.blck_size = 1", "kernel.blck_size: unknown option of 'jax-ring' (lwm-jax-ring 1.2); "
                                 "did you mean block_size?"),
        ("kind = 'xla'", "kind: unknown option of 'jax-ring' (lwm-jax-ring 1.2) here; "
                         "did you mean attention.kernel.kind?"),
        ("lr = 'fast'", "lr: expected a number, got 'fast'"),
        ("lr = {}", "lr: expected a number, got a table"),
        ("block_size = 1.5", "block_size: expected a whole number, got 1.5"),
        ("block_size = 'x'", "block_size: expected a whole number, got 'x'"),
        ("q-width = 'x'", "q-width: expected a whole number, got 'x'"),
        ("on = 'perhaps'", "on: expected true or false, got 'perhaps'"),
        ("needed = true", "needed: expected a text, got true"),
        ("paths = 3", "paths: expected a text or a list, got 3"),
        ("paths = ['a', 3]", "paths.1: expected a text, got 3"),
        ("kernel = 3", "kernel: expected a table or a text, got 3"),
        ("kernel.block_size = 0", "kernel.block_size: expected a number greater than 0, got 0"),
        ("kernel.kind = 'cuda'", "kernel.kind: expected 'xla' or 'pallas', got 'cuda'"),
        ("named.a.block_size = -1", "named.a.block_size: expected a number greater than 0, got -1"),
        ("named.a.x = -1", "named.a.x: unknown option of 'jax-ring' (lwm-jax-ring 1.2); known: block_size, kind"),
        ("many = [{}, {kid = 1}]", "many.1.kid: unknown option of 'jax-ring' (lwm-jax-ring 1.2); did you mean kind?"),
        ("many = 'x'", "many: expected a list, got 'x'"),
        ("limited = [1, 2, 3]", "limited: expected at most 2 items, got [1, 2, 3]"),
        ("even = 3", "even: 3 is odd;; write an even number"),
        (f"lr = '{'y' * 99}'", f"lr: expected a number, got '{'y' * 56}..."),
    ],
)  # fmt: skip
def test_one_mistake_one_line(text: str, line: str, tmp_path: Path) -> None:
    assert options(text, tmp_path) == [f"exp.toml:4: attention.{line}"]


def test_a_missing_key_points_to_its_table(tmp_path: Path) -> None:
    (line,) = options("", tmp_path, model=Needy)
    assert line == "exp.toml:3: attention.must: missing (how many); add must = ..."


def test_all_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    found = options("kernel.kind = 1\non = 'x'\n\nlr = 'y'\nblock_size = 'z'", tmp_path, ("attention.even=1",))
    assert [line.split(": ")[0] for line in found] == [
        "exp.toml:4", "exp.toml:5", "exp.toml:7", "exp.toml:8", "-s attention.even=1",
    ]  # fmt: skip


def test_overrides_are_named_as_typed(tmp_path: Path) -> None:
    texts = ("attention.lr=fast", "attention={blok_size=1}", "attention.kernel={kind=2}")
    assert options("lr = 1", tmp_path, texts) == [
        "-s attention.lr=fast: expected a number, got 'fast'",
        "-s attention.kernel={kind=2}: attention.kernel.kind: expected 'xla' or 'pallas', got 2",
        "-s attention={blok_size=1}: attention.blok_size: unknown option of 'jax-ring' (lwm-jax-ring 1.2); "
        "did you mean block_size?",
    ]


def test_a_model_without_keys_and_a_document_without_origins() -> None:
    class Empty(BaseModel):
        model_config = ConfigDict(extra="forbid")

    with pytest.raises(ValidationError) as caught:
        Empty.model_validate({"x": 1})
    assert problems_from(caught.value, Empty, {}) == ["x: unknown key; there are none here"]


def load(tmp_path: Path, text: str, *overrides: str, **extra: Any) -> Any:
    (tmp_path / "exp.toml").write_text(text, encoding="utf-8")
    return load_config("exp.toml", overrides, extra or None)


def problems(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    assert caught.value.exit_code == 2
    return caught.value.problems


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_good_configuration(tmp_path: Path) -> None:
    text = GOOD + "[attention]\nname = 'jax-ring'\nlayout = 'zigzag'"
    loaded = load(tmp_path, text, "stages.0.lr=1", run={"out": "r"})
    assert loaded.config.stages[0].lr == 1.0 and loaded.config.run.out == "r"
    assert loaded.config.attention.options == {"layout": "zigzag"}
    assert loaded.data["stages"] == [{"seq_len": 256, "tokens": 1000, "batch_tokens": 512, "lr": 1}]
    assert str(loaded.origins["stages", 0, "lr"]) == "-s stages.0.lr=1"
    assert str(loaded.origins["attention", "layout"]) == "exp.toml:11"
    assert str(loaded.origins["run", "out"]) == "given by the command"
    assert loaded.notes == () and loaded.source == "exp.toml"


def test_every_kind_of_mistake_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LWM_NOT_SET", raising=False)
    text = GOOD + 'min_lr = "${env:LWM_NOT_SET}"\nmesh = "1,2"\ntoks = 3\n'
    text += '[optimiser]\nlr = 1\n[run]\nlog_every = "often"\n'
    assert problems(tmp_path, text, "seed=-1", "stages.4.lr=1", "model.preset=7", "clip_norm=1") == [
        "-s stages.4.lr=1: stages is a list with items 0 to 0, got '4'; a longer list is set as a whole",
        "exp.toml:9: stages.0.min_lr: environment variable 'LWM_NOT_SET' is not set; export it first",
        "exp.toml:10: stages.0.mesh: mesh '1,2' has 2 sizes; expected four: dp,fsdp,tp,sp",
        "exp.toml:11: stages.0.toks: unknown key; did you mean tokens?",
        "exp.toml:12: optimiser: unknown key; did you mean optimizer?",
        "exp.toml:15: run.log_every: expected a whole number, got 'often'",
        "-s seed=-1: expected a number of at least 0, got -1",
        "-s model.preset=7: expected a text, got 7",
        "-s clip_norm=1: unknown key here; did you mean optimizer.clip_norm?",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD.replace("tokens = 1000\n", ""), "exp.toml:4: stages.0.tokens: missing (tokens to train on, padding "
         "included; rounded up to whole steps); add tokens = ..."),
        (STAGE, "exp.toml: data: missing (the feed); add data = ..."),
        (GOOD.replace('name = "text"', "x = 1"), "exp.toml:2: data.name: missing (plugin name, 'auto', or "
         "'distribution:name' where two offer the same name); add name = ..."),
        (GOOD.replace("512", "500"), "exp.toml:7: stages.0.batch_tokens: batch_tokens = 500 is not a multiple "
         "of seq_len = 256; use 256"),
        ("[data]\nname = 'text'", "exp.toml: give either a [context] plugin or a literal [[stages]] list, "
         "and not both"),
        ("data = 'text'\n" + STAGE, "exp.toml:1: data: expected a table, got 'text'"),
        (GOOD.replace("[[stages]]", "[stages]"), "exp.toml:4: stages: expected a list, got a table"),
        ('name = "a b"\n' + GOOD.removeprefix('name = "x"\n'), "exp.toml:1: name: expected a text that matches "
         "^[A-Za-z0-9][A-Za-z0-9._-]*$, got 'a b'"),
    ],
)  # fmt: skip
def test_the_envelope(tmp_path: Path, text: str, expected: str) -> None:
    assert problems(tmp_path, text) == [expected]


def test_naming_another_plugin_tells_what_is_dropped(tmp_path: Path) -> None:
    text = GOOD + "[attention]\nname = 'jax-ring'\nlayout = 'zigzag'\n[[evals]]\nname = 'needle'\ndepths = 4\n"
    loaded = load(tmp_path, text, "attention.name=torch-ring", "evals.0.name=ruler", "stages.0.name=s", "name=other")
    assert loaded.config.attention.options == {} and loaded.config.evals[0].options == {}
    assert loaded.config.stages[0].seq_len == 256 and loaded.config.name == "other"
    assert [note.partition("whose options are dropped: ")[2] for note in loaded.notes] == ["layout", "depths"]


def test_which_tables_are_plugins() -> None:
    from lwm_core.config import RunConfig

    test = plugin_tables(RunConfig)
    assert all(test(path) for path in [("attention",), ("context",), ("evals", 3), ("data",)])
    assert not any(test(path) for path in [(), ("stages", 0), ("model",), ("evals",), ("data", "x"), ("nope", "x")])


def test_near_misses_never_break_on_odd_locations() -> None:
    origins: Origins = {path: Origin("a.toml", 1) for path, _ in walk({"kernel": {"kind": {}}})}
    document = Document("a.toml", {"kernel": {"kind": {}}}, origins)
    with pytest.raises(ValidationError) as caught:
        Ring.model_validate(document.data)
    expected = "a.toml:1: kernel.kind: expected 'xla' or 'pallas', got a table"
    assert problems_from(caught.value, Ring, origins) == [expected]


def test_importing_the_room_is_cheap() -> None:
    code = (
        "import sys, lwm_core.config, lwm_core.config.read, lwm_core.config.problems, lwm_core.config.dump\n"
        "import lwm_core.config.override, lwm_core.config.interpolate, lwm_core.cli.config, lwm_core.cli.recipes\n"
        "heavy = {'pydantic', 'numpy', 'rich', 'pluggy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "for name in dir(lwm_core.config): assert getattr(lwm_core.config, name) is not None, name\n"
        "assert 'pydantic' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(lwm_core.__file__).parents[1])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{kind = "copy", text = 0}', "attention.sources.text.text: expected a number greater than 0, got 0"),
        ('{kind = "text", path = 3}', "attention.sources.text.path: expected a text, got 3"),
        ('{kind = "text"}', "attention.sources.text.path: missing; add path = ..."),
        ('{kind = "copy", pth = 1}', "attention.sources.text.pth: unknown option of 'jax-ring' (lwm-jax-ring 1.2); "
                                     "known: kind, text"),
        ('{kind = "copy", path = "a"}', "attention.sources.text.path: unknown option of 'jax-ring' (lwm-jax-ring 1.2); "
                                        "known: kind, text"),
    ],
)  # fmt: skip
def test_tagged_alternatives_keep_their_keys_apart(text: str, line: str, tmp_path: Path) -> None:
    (problem,) = options(f"sources.text = {text}", tmp_path, model=Tagged)
    assert problem == f"exp.toml:4: {line}"
