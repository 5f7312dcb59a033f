"""PluginSpec: what it refuses, and that it stays as it was checked."""

from __future__ import annotations

import dataclasses
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_core.errors import PluginError
from lwm_core.registry import KINDS, PluginSpec
from lwm_core.registry.spec import is_import_path, is_plugin_name

GOOD = {"name": "jax-ring", "summary": "Ring attention.", "factory": "pkg.mod:build"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "Jax-Ring"),
        ("name", "jax_ring"),
        ("name", "-ring"),
        ("name", "ring--x"),
        ("name", ""),
        ("name", None),
        ("summary", ""),
        ("summary", "two\nlines"),
        ("factory", "pkg.mod"),
        ("factory", "pkg:"),
        ("factory", "../x:build"),
        ("factory", None),
        ("options", "pkg mod:Options"),
        ("probe", "probe"),
        ("needs", "jax"),
        ("needs", ("jax.numpy",)),
        ("needs", ["jax"]),
        ("framework", "tensorflow"),
        ("devices", "cpu"),
        ("priority", 1.5),
        ("priority", True),
        ("capabilities", ["masks"]),
        ("capabilities", {"masks": ["causal"]}),
        ("capabilities", {"masks": "causal"}),
        ("capabilities", {"Masks": ("causal",)}),
        ("capabilities", {"framework": ("jax",)}),
    ],
)
def test_a_malformed_field_is_named(field: str, value: object) -> None:
    with pytest.raises(PluginError, match=field) as caught:
        PluginSpec(**{**GOOD, field: value})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_devices_are_said_once() -> None:
    with pytest.raises(PluginError, match="twice"):
        PluginSpec(**GOOD, devices=("cpu",), capabilities={"devices": ("tpu",)})  # type: ignore[arg-type]
    assert PluginSpec(**GOOD, devices=("cpu",)).capability("devices") == ("cpu",)  # type: ignore[arg-type]
    assert PluginSpec(**GOOD, capabilities={"devices": ("tpu",)}).capability("devices") == ("tpu",)  # type: ignore[arg-type]


def test_a_spec_is_frozen_all_the_way() -> None:
    stated: dict[str, object] = {"masks": ("causal",)}
    spec = PluginSpec(**GOOD, capabilities=stated)  # type: ignore[arg-type]
    stated["masks"] = ("full",)
    assert spec.capability("masks") == ("causal",)
    with pytest.raises(TypeError):
        spec.capabilities["masks"] = ("full",)  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.priority = 3  # type: ignore[misc]
    assert {spec: 1}[PluginSpec(**GOOD, capabilities={"masks": ("causal",)})] == 1  # type: ignore[arg-type]


def test_the_kinds_and_their_groups() -> None:
    assert " ".join(KINDS) == "attention tokenizer encoder media trainer context data eval weights hooks cli"
    assert all(group == f"lwm.{kind}.v1" for kind, group in KINDS.items())


@given(st.text(alphabet=string.ascii_letters + string.digits + "-_. ", max_size=12))
def test_kebab_case_as_defined_by_its_words(name: str) -> None:
    words = name.split("-")
    expected = all(word and all(c in string.ascii_lowercase + string.digits for c in word) for word in words)
    assert is_plugin_name(name) == expected


@given(st.text(alphabet="ab1_.: ", max_size=10))
def test_import_paths_as_defined_by_identifiers(path: str) -> None:
    module, colon, attribute = path.partition(":")
    parts = module.split(".") + attribute.split(".")
    assert is_import_path(path) == (colon == ":" and all(part.isidentifier() for part in parts))
