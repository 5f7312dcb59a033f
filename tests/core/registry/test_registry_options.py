"""A plugin's options: its own model validates, its schema joins the others' in one document."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from lwm_core.errors import PluginError
from lwm_core.registry import NoOptions, options_schema, plugin_options_model, validate_options

MODEL = """
from pydantic import BaseModel, ConfigDict, Field
class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    size: int = {size}
class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")
    block_size: int = Field(512, description="tokens")
    layout: str
    inner: Inner = Inner()
"""


def _plant(garden, name: str, size: int = 1) -> None:
    module = "acme_" + name
    garden.attention(f"acme-{name}", module, name, f"options='{module}_options:Options'")
    (garden.folder / f"{module}_options.py").write_text(MODEL.format(size=size))


def test_validation_is_the_models_own(garden) -> None:
    _plant(garden, "ring")
    registry = garden.registry()
    made = validate_options(registry, "attention", "ring", {"layout": "zigzag", "inner": {"size": 3}})
    assert made.model_dump() == {"block_size": 512, "layout": "zigzag", "inner": {"size": 3}}
    with pytest.raises(ValidationError) as caught:
        validate_options(registry, "attention", "ring", {"blok_size": 1, "block_size": "x"})
    assert {error["loc"] for error in caught.value.errors()} == {("blok_size",), ("block_size",), ("layout",)}


def test_a_plugin_without_options_refuses_any(garden) -> None:
    garden.attention("acme-bare", "acme_bare", "bare")
    registry = garden.registry()
    assert plugin_options_model(registry, "attention", "bare") is NoOptions
    assert validate_options(registry, "attention", "bare", {}) == NoOptions()
    with pytest.raises(ValidationError, match="block_size"):
        validate_options(registry, "attention", "bare", {"block_size": 1})


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("Options = dict", "expected a pydantic model class"),
        ("from pydantic import BaseModel\nclass Options(BaseModel):\n    x: int = 1", "must set extra='forbid'"),
        ("raise ValueError('boom')", "failed to import: ValueError: boom"),
    ],
)
def test_bad_options_are_the_plugins_fault(garden, source: str, said: str) -> None:
    _plant(garden, "ring")
    (garden.folder / "acme_ring_options.py").write_text(source)
    with pytest.raises(PluginError, match=said.replace("(", r"\(")):
        validate_options(garden.registry(), "attention", "ring", {})


def _resolve(schema: dict, ref: str) -> dict:
    assert ref.startswith("#/")
    node = schema
    for part in ref[2:].split("/"):
        node = node[part]
    return node


def test_one_schema_over_all_plugins_of_a_kind(garden) -> None:
    _plant(garden, "one", size=1)
    _plant(garden, "two", size=2)
    garden.attention("acme-bare", "acme_bare", "bare")
    garden.plant("acme-bad", {"attention": {"bad": "acme_bad:x"}}, {"acme_bad": "raise RuntimeError"})
    schema = options_schema(garden.registry(), "attention")
    titles = [branch["title"] for branch in schema["oneOf"]]
    assert titles == ["auto", "bare", "one", "two"]
    for branch in schema["oneOf"][2:]:
        inner = _resolve(schema, branch["properties"]["inner"]["$ref"])
        assert inner["properties"]["size"]["default"] == {"one": 1, "two": 2}[branch["title"]]
        assert branch["additionalProperties"] is False
        assert branch["required"] == ["name", "layout"]
        assert branch["properties"]["name"] == {"enum": [branch["title"], f"acme-{branch['title']}:{branch['title']}"]}
    assert list(schema["oneOf"][1]["properties"]) == ["name"]


def test_the_schema_of_one_plugin(garden) -> None:
    _plant(garden, "one")
    schema = options_schema(garden.registry(), "attention", "one")
    assert schema["properties"]["name"] == {"const": "one"}
    assert schema["properties"]["block_size"]["description"] == "tokens"
    assert _resolve(schema, schema["properties"]["inner"]["$ref"])["type"] == "object"


def test_names_offered_twice_stand_in_the_schema_by_label(garden) -> None:
    garden.attention("acme-a", "acme_a", "ring")
    garden.attention("acme-b", "acme_b", "ring")
    branches = options_schema(garden.registry(), "attention")["oneOf"][1:]
    assert [b["properties"]["name"] for b in branches] == [{"const": "acme-a:ring"}, {"const": "acme-b:ring"}]
