"""Merging, overriding and reading sources: which value wins, where it says it is from, what is dropped."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lwm_core.config import read
from lwm_core.config.document import Document, KeyPath, Origin, dotted, no_plugin_tables, walk
from lwm_core.config.merge import merge
from lwm_core.config.override import apply_overrides, parse_override
from lwm_core.config.read import read_source
from lwm_core.errors import ConfigError, UsageError

KEYS = st.sampled_from(["a", "b", "c", "name"])
VALUES = st.recursive(
    st.integers(0, 9), lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(KEYS, inner, max_size=3))
)
TABLES = st.dictionaries(KEYS, VALUES, max_size=4)


def is_attention(path: KeyPath) -> bool:
    return path == ("attention",)


def document(data: dict[str, Any], name: str = "a.toml") -> Document:
    return Document(name, data, {path: Origin(name, 1) for path, _ in walk(data)})


def merged(base: Any, over: Any) -> Any:
    """The oracle: what deep merging means, in one line."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return {k: merged(base[k], over[k]) if k in base and k in over else (over | base)[k] for k in base | over}


@settings(deadline=None)
@given(TABLES, TABLES)
def test_merge_is_deep_and_keeps_origins(base: dict[str, Any], over: dict[str, Any]) -> None:
    first, second = document(deepcopy(base), "base"), document(deepcopy(over), "over")
    result = merge(first, second, no_plugin_tables)
    assert result.data == merged(base, over)
    assert set(result.origins) == {path for path, _ in walk(result.data)}
    over_paths = {path for path, _ in walk(over)}
    assert all((origin.source == "over") == (path in over_paths) for path, origin in result.origins.items() if path)
    assert (first.data, second.data) == (base, over)  # neither was changed


@settings(deadline=None)
@given(TABLES)
def test_merge_shares_nothing_with_its_inputs(over: dict[str, Any]) -> None:
    second = document(deepcopy(over))
    result = merge(document({}), second, no_plugin_tables)
    for value in [value for _, value in walk(result.data) if isinstance(value, dict | list)]:
        value.clear()
    assert second.data == over


BASE = {"name": "x", "attention": {"name": "jax-ring", "layout": "zigzag", "kernel": {"block": 4}}}


def test_another_plugin_drops_the_options_of_the_one_before() -> None:
    other = document({"attention": {"name": "torch-ring", "layout": "striped"}}, "b.toml")
    result = merge(document(BASE), other, is_attention)
    assert result.data["attention"] == {"name": "torch-ring", "layout": "striped"}
    assert set(result.origins) == {path for path, _ in walk(result.data)}
    assert result.notes == (
        "b.toml:1: attention: 'torch-ring' takes the place of 'jax-ring', "
        "whose options are dropped: layout, kernel.block",
    )


def test_the_same_plugin_keeps_its_options_and_other_tables_may_rename() -> None:
    same = merge(document(BASE), document({"attention": {"name": "jax-ring", "window": 1}}), is_attention)
    assert same.data["attention"] == {**BASE["attention"], "window": 1} and same.notes == ()
    renamed = merge(document(BASE), document({"name": "y"}), is_attention)
    assert renamed.data == {**BASE, "name": "y"} and renamed.notes == ()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_overrides_together_name_a_plugin_and_its_options(order: tuple[int, ...]) -> None:
    texts = ["attention.name=torch-ring", "attention.strategy=ulysses", "attention.kernel.q=2"]
    result, problems = apply_overrides(document(BASE), [texts[i] for i in order], is_attention)
    assert problems == []
    assert result.data["attention"] == {"name": "torch-ring", "strategy": "ulysses", "kernel": {"q": 2}}
    (note,) = result.notes
    assert note.startswith("-s attention.name=torch-ring: attention: 'torch-ring'")
    assert note.endswith("layout, kernel.block")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4), ("1_000", 1000), ("true", True), ("'1'", "1"), ('"a b"', "a b"), ("[1, 2]", [1, 2]),
        ("{x = 1, y.z = 2}", {"x": 1, "y": {"z": 2}}), ("jax-ring", "jax-ring"), ("runs/a", "runs/a"),
        ("1,1,1,8", "1,1,1,8"), ("True", "True"), ("${a.b}", "${a.b}"), ("a=b", "a=b"), ("1 # x", "1 # x"),
        ("1}\nw = {", "1}\nw = {"), ("1, w = 2", "1, w = 2"), (" 5 ", 5), ("1\nb = 2", "1\nb = 2"),
    ],
)  # fmt: skip
def test_values_are_toml_or_words(text: str, value: Any) -> None:
    parts, got = parse_override(f"a.b={text}")
    assert parts == ("a", "b") and got == value and type(got) is type(value)


def test_quoted_keys() -> None:
    assert parse_override("a.\"b.=c\".'d' = 1") == (("a", "b.=c", "d"), 1)


@pytest.mark.parametrize("text", ["", "a", "a.=1", ".a=1", "=1", "a b=1", "a=", "a=[1", 'a="x', "a={b}", 'a."\\q"=1'])
def test_overrides_that_cannot_be_read(text: str) -> None:
    _, problems = apply_overrides(document({"x": 1}), [text, "x=2"], no_plugin_tables)
    (problem,) = problems
    assert problem.startswith(f"-s {text}: ") and "\n" not in problem


def test_overrides_reach_list_items_and_the_last_wins() -> None:
    data = {"stages": [{"tokens": 1, "mix": {"a": 1}}, {"tokens": 2}], "sizes": [[1, 2], [3]]}
    texts = ["stages.1.tokens=5", "stages.1.tokens=6", "stages.0.mix.b=2", "sizes.0.1=9", "stages.0={lr=1}", "new.x=1"]
    result, problems = apply_overrides(document(data), texts, no_plugin_tables)
    assert problems == []
    assert result.data == {
        "stages": [{"tokens": 1, "mix": {"a": 1, "b": 2}, "lr": 1}, {"tokens": 6}],
        "sizes": [[1, 9], [3]],
        "new": {"x": 1},
    }
    assert str(result.origins["stages", 1, "tokens"]) == "-s stages.1.tokens=6"
    assert str(result.origins["stages", 0, "tokens"]) == "a.toml:1"
    assert set(result.origins) == {path for path, _ in walk(result.data)}


def test_overrides_that_lead_nowhere() -> None:
    data = {"stages": [{"tokens": 1}], "lr": 0.1, "none": []}
    texts = ["stages.1.tokens=5", "stages.x=1", "lr.x=1", "none.0=1", "stages.0.tokens.y=2"]
    result, problems = apply_overrides(document(data), texts, no_plugin_tables)
    assert result.data == data
    assert [problem.split(": ")[0] for problem in problems] == [f"-s {text}" for text in texts]
    assert "stages is a list with items 0 to 0, got '1'" in problems[0]
    assert "lr is 0.1 and has no keys" in problems[2]


@settings(deadline=None)
@given(TABLES, st.data())
def test_an_override_for_every_key_restores_the_document(table: dict[str, Any], data: st.DataObject) -> None:
    texts = [f"{dotted(path)}={json.dumps(value)}" for path, value in walk(table) if isinstance(value, int)]
    zeroed = json.loads(json.dumps(table), parse_int=lambda text: 0)
    result, problems = apply_overrides(document(zeroed), data.draw(st.permutations(texts)), no_plugin_tables)
    assert problems == [] and result.data == table


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def test_extends_merges_relative_files_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {
        "exp/run.toml": 'extends = ["../base.toml", "more.json"]\nlr = 3\n[t]\nx = [9]\n',
        "base.toml": 'extends = ["sub/deep.toml"]\nlr = 1\nseed = 1\n[t]\nx = [1, 2]\ny = 1\n',
        "sub/deep.toml": "seed = 0\ndeep = true\n",
        "exp/more.json": '{\n  "seed": 2,\n  "t": {"z": 3}\n}',
    })  # fmt: skip
    monkeypatch.chdir(tmp_path)
    result = read_source("exp/run.toml")
    assert result.data == {"seed": 2, "deep": True, "lr": 3, "t": {"x": [9], "y": 1, "z": 3}}
    shown = {dotted(path): str(origin) for path, origin in result.origins.items()}
    assert shown == {
        "": "exp/run.toml", "seed": "exp/more.json:2", "deep": "exp/../sub/deep.toml:2", "lr": "exp/run.toml:2",
        "t": "exp/run.toml:3", "t.x": "exp/run.toml:4", "t.x.0": "exp/run.toml:4",
        "t.y": "exp/../base.toml:6", "t.z": "exp/more.json:3",
    }  # fmt: skip


def test_circles_show_the_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {
        "a.toml": '\nextends = ["b.toml"]', "b.toml": 'extends = ["c.toml", "d.toml"]',
        "c.toml": "x = 1", "d.toml": 'extends = ["./a.toml"]',
    })  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        read_source("a.toml")
    assert str(caught.value) == (
        "d.toml:1: extends: the files extend each other in a circle: a.toml -> b.toml -> d.toml -> a.toml"
    )


def test_one_base_may_be_reached_twice(tmp_path: Path) -> None:
    write(tmp_path, {
        "a.toml": 'extends = ["b.toml", "c.toml"]', "b.toml": 'extends = ["d.toml"]\nb = 1',
        "c.toml": 'extends = ["d.toml"]\nc = 1', "d.toml": "d = 1",
    })  # fmt: skip
    assert read_source(tmp_path / "a.toml").data == {"d": 1, "b": 1, "c": 1}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a = 1\nb = [1,\n", "bad.toml:2: "),
        ("a = 1\n\na = 2\n", "bad.toml:3: Cannot overwrite a value"),
        ("[a]\nb 1", "bad.toml:2: Expected '=' after a key in a key/value pair (column 3)"),
        ('extends = "base.toml"', "bad.toml:1: extends: expected a list"),
        ('x = 1\nextends = [\n"y.toml"]', "bad.toml:3: extends: "),
        ("a = " + "[" * 5000 + "]" * 5000, "bad.toml: "),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, problem: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"bad.toml": text})
    with pytest.raises(ConfigError) as caught:
        read_source("bad.toml")
    (line,) = caught.value.problems
    assert line.startswith(problem) and "\n" not in line


@pytest.mark.parametrize("text", ['{"a": 1,}', '{"a": 1, "a": 2}', "[1]", "nonsense"])
def test_json_that_is_wrong(tmp_path: Path, text: str) -> None:
    write(tmp_path, {"bad.json": text})
    with pytest.raises(ConfigError, match=r"bad\.json"):
        read_source(tmp_path / "bad.json")


def test_text_that_is_not_utf8_and_byte_order_marks(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes("a = 'é'".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_source(tmp_path / "latin.toml")
    (tmp_path / "bom.toml").write_bytes("a = 1".encode("utf-8-sig"))
    assert read_source(tmp_path / "bom.toml").data == {"a": 1}


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write(tmp_path, {
        "recipes/base.toml": "seed = 1\n[t]\nx = 1\n",
        "recipes/quickstart.toml": 'summary = "q"\nextends = ["base.toml"]\n',
    })  # fmt: skip
    monkeypatch.setattr(read, "recipes_folder", lambda: tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_recipes_by_name_and_as_bases(recipes: Path) -> None:
    assert read.recipe_names() == ["base", "quickstart"]
    assert read_source("quickstart").data == {"summary": "q", "seed": 1, "t": {"x": 1}}
    write(recipes, {"mine.toml": 'extends = ["quickstart"]\nseed = 2'})
    mine = read_source("mine.toml")
    assert mine.data == {"summary": "q", "seed": 2, "t": {"x": 1}}
    assert str(mine.origins["t", "x"]) == "recipe base:3"


def test_a_file_may_be_called_as_a_recipe_it_extends(recipes: Path) -> None:
    write(recipes, {"quickstart.toml": 'extends = ["quickstart"]\nseed = 3'})
    assert read_source("quickstart.toml").data["seed"] == 3
    assert read_source("quickstart").data["seed"] == 1


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("quikstart", "did you mean quickstart? known recipes: base, quickstart"),
        ("nothing-near", "known recipes: base, quickstart"),
        ("missing.toml", "missing.toml: no such file"),
        ("recipes", "known recipes"),
        ("exp.yaml", "is a .toml or .json file"),
        ("a/b", "is a .toml or .json file"),
    ],
)
def test_sources_that_are_not_there(recipes: Path, source: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_source(source)
    assert words in str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.toml").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        read_source(tmp_path / "x.toml")
