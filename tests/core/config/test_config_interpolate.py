"""References to other keys and to the environment."""

from __future__ import annotations

from typing import Any

import pytest

from lwm_core.config.document import Document, KeyPath, Origin, walk
from lwm_core.config.interpolate import interpolate

ENVIRON = {"HOME": "/home/x", "N": "8", "TRICK": "${a}"}


def resolve(data: dict[str, Any]) -> tuple[dict[str, Any], list[str], set[KeyPath]]:
    origins = {path: Origin("a.toml", number) for number, (path, _) in enumerate(walk(data))}
    result, problems, unresolved = interpolate(Document("a.toml", data, origins), ENVIRON)
    assert set(result.origins) >= {path for path, _ in walk(result.data)}
    return result.data, problems, unresolved


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${a}", 1), ("${t.x}", [1, 2]), ("${t.x.1}", 2), ("${ t . y }", "s"), ('${t."odd key"}', 1.5), ("${t}", None),
        ("${env:HOME}", "/home/x"), ("${env:N}", "8"), ("${chain}", 1), ("${alias.x.0}", 1),
        ("plain $ {a}", "plain $ {a}"),
        ("$${a}", "${a}"), ("cost $${", "cost ${"), ("${env:TRICK}", "${a}"), ("${literal.k}", "${a}"), ("$a", "$a"),
    ],
)  # fmt: skip
def test_references(text: str, value: Any) -> None:
    table = {"x": [1, 2], "y": "s", "odd key": 1.5}
    data = {"a": 1, "t": table, "chain": "${again}", "again": "${a}", "alias": "${t}",
            "lit": {"k": "$${a}"}, "literal": "${lit}", "here": [{"deep": text}]}  # fmt: skip
    result, problems, _ = resolve(data)
    assert problems == []
    assert result["here"] == [{"deep": table if value is None else value}]


def test_a_table_referred_to_is_resolved_and_its_own() -> None:
    data = {"base": {"lr": "${lr}", "s": [{"n": "${env:N}"}]}, "lr": 0.1, "copy": "${base}"}
    result, problems, _ = resolve(data)
    assert problems == [] and result["copy"] == {"lr": 0.1, "s": [{"n": "8"}]} == result["base"]
    assert result["copy"] is not result["base"]
    assert data["copy"] == "${base}"  # the input is left alone


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("${env:NOPE}", "environment variable 'NOPE' is not set"),
        ("${env:}", "environment variable '' is not set"),
        ("${t.xx}", "did you mean ${t.x}?"),
        ("${zzzzzz}", "only keys that are written out"),
        ("${t.x.7}", "refers to a key that is not set"),
        ("${t.x.-1}", "refers to a key that is not set"),
        ("${t.x.k}", "refers to a key that is not set"),
        ("${a.b}", "refers to a key that is not set"),
        ("${a + 1}", "without expressions"),
        ("${}", "without expressions"),
        ("${a = 1}", "without expressions"),
        ("x ${a}", "a reference is a whole value"),
        ("${a}${a}", "a reference is a whole value"),
        ("${a", "a reference is a whole value"),
        ("${env:{HOME}}", "a reference is a whole value"),
    ],
)
def test_references_without_a_value(text: str, words: str) -> None:
    data = {"a": 1, "t": {"x": [1, 2]}, "here": text}
    result, problems, unresolved = resolve(data)
    (problem,) = problems
    assert problem.startswith("a.toml:6: here: ") and words in problem
    assert unresolved == {("here",)} and result == data


def test_every_mistake_is_told_once() -> None:
    data = {"a": "${env:X}", "b": "${a}", "c": "${nope}", "d": 1}
    result, problems, unresolved = resolve(data)
    assert [problem.split(": ")[1] for problem in problems] == ["a", "c"]
    assert unresolved == {("a",), ("b",), ("c",)} and result == data


@pytest.mark.parametrize(
    ("data", "circle"),
    [
        ({"a": "${a}"}, "a -> a"),
        ({"b": "${c}", "c": "${a}", "a": "${b}"}, "a -> b -> c -> a"),
        ({"t": {"x": "${t}"}}, "t -> t.x -> t"),
        ({"t": {"x": "${u}"}, "u": {"y": "${t.x.y}"}}, "t.x -> u -> u.y -> t.x"),
        ({"l": [1, "${l.1}"]}, "l.1 -> l.1"),
    ],
)
def test_circles(data: dict[str, Any], circle: str) -> None:
    _, problems, _ = resolve(data)
    assert len(problems) == 1
    assert f"refers to itself: {circle}" in problems[0]
    assert problems[0].split(": ")[1] == circle.split(" ")[0]
