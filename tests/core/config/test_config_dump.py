"""The TOML writer, against tomllib."""

from __future__ import annotations

import math
import tomllib
from datetime import UTC, datetime, time, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lwm_core.config.document import dotted, walk
from lwm_core.config.dump import dump_toml
from lwm_core.config.locate import locate_toml
from lwm_core.config.override import parse_override

TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)
ZONES = st.sampled_from([None, UTC, timezone(timedelta(hours=-3, minutes=-30))])
SCALARS = st.one_of(
    TEXTS,
    st.integers(),
    st.booleans(),
    st.floats(allow_nan=False),
    st.datetimes(timezones=ZONES),
    st.dates(),
    st.times(),
)
VALUES = st.recursive(
    SCALARS, lambda at: st.one_of(st.lists(at, max_size=3), st.dictionaries(TEXTS, at, max_size=3)), max_leaves=12
)
DOCUMENTS = st.dictionaries(TEXTS, VALUES, max_size=5)


def typed(value: Any) -> Any:
    """``value`` with its types, so that 1, 1.0 and true differ, and -0.0 and 0.0 too."""
    if isinstance(value, dict):
        return {key: typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [typed(item) for item in value]
    if isinstance(value, datetime | time):
        return type(value), value.isoformat()  # tomllib has a class of its own for offsets
    return type(value), repr(value)


@settings(deadline=None)
@given(DOCUMENTS)
def test_what_is_written_reads_back(document: dict[str, Any]) -> None:
    read = tomllib.loads(dump_toml(document))
    assert read == document and typed(read) == typed(document)


@settings(deadline=None)
@given(DOCUMENTS, TEXTS)
def test_remarks_change_nothing_and_reach_their_keys(document: dict[str, Any], remark: str) -> None:
    printable = "".join(one for one in remark if one.isprintable())
    text = dump_toml(document, lambda path: f"<{len(path)}> {printable}")
    assert tomllib.loads(text) == document
    lines = text.split("\n")
    for path, line in locate_toml(text).items():
        if isinstance(path[-1], str) and all(isinstance(part, str) for part in path) and document:
            assert "# <" in lines[line - 1]


@settings(deadline=None)
@given(DOCUMENTS)
def test_dotted_keys_are_what_overrides_take(document: dict[str, Any]) -> None:
    for path, _ in walk(document):
        if path:
            assert parse_override(f"{dotted(path)}=1")[0] == tuple(str(part) for part in path)


def test_special_floats_and_none() -> None:
    read = tomllib.loads(dump_toml({"a": math.inf, "b": -math.inf, "c": math.nan, "d": None, "t": {"e": None}}))
    assert math.isnan(read.pop("c"))
    assert read == {"a": math.inf, "b": -math.inf, "t": {}}


@pytest.mark.parametrize("value", [object(), [None], {"x": [{1, 2}]}, b"x"])
def test_what_toml_cannot_hold_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="TOML has no form"):
        dump_toml({"a": value})


def test_it_looks_as_people_write_it() -> None:
    data = {"stages": [{"lr": 0.1, "mix": {"a": 1.0}}, {"lr": 1e-05}], "seed": 1, "name": "x", "t": {"p": ["a", 'b"']}}
    assert dump_toml(data, lambda path: "here" if path == ("seed",) else None) == (
        'seed = 1  # here\nname = "x"\n\n[[stages]]\nlr = 0.1\n\n[stages.mix]\na = 1.0\n\n[[stages]]\nlr = 1e-05\n'
        '\n[t]\np = ["a", "b\\""]\n'
    )
