"""The kit of every plugin, on one that is right and on ones that are wrong in a single way."""

from __future__ import annotations

import pytest

from lwm_core.testing import PluginSuite


def suite(plugin: str) -> PluginSuite:
    return type("Suite", (PluginSuite,), {"kind": "attention", "name": plugin})()


def standard_tests() -> list[str]:
    return [name for name in dir(PluginSuite) if name.startswith("test_")]


@pytest.mark.parametrize("name", ["acme-numpy", "acme-numpy:acme-numpy"])
def test_a_right_plugin_passes_everything(acme: str, name: str) -> None:
    for test in standard_tests():
        getattr(suite(name), test)()


@pytest.mark.parametrize(
    ("name", "test", "told"),
    [
        ("acme-heavy", "test_its_spec_is_light", "numpy"),
        ("acme-heavy", "test_it_is_offered_once_and_nothing_speaks_against_it", "broken: .*no_such_module"),
        ("acme-silent", "test_its_options_describe_themselves", "speed"),
        ("acme-silent", "test_its_modules_are_named_in_full", "needs"),
        ("acme-hollow", "test_its_factory_can_be_called", "lacks layout, build, harness"),
    ],
)
def test_a_wrong_plugin_fails(acme: str, name: str, test: str, told: str) -> None:
    with pytest.raises(AssertionError, match=told):
        getattr(suite(name), test)()
