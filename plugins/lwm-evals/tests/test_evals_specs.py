"""What the distribution says of itself: it is light, and the registry finds what it names."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lwm_core.registry import Registry, plugin_options_model
from lwm_evals import NeedleOptions, NeedleSuite
from lwm_evals.hooks import ReportHooks


def test_specs_import_nothing_heavy() -> None:
    code = (
        "import sys, lwm_evals._lwm\n"
        "print(sorted({'numpy', 'matplotlib', 'jinja2', 'pydantic', 'jax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("kind", "name", "factory"), [("eval", "needle", NeedleSuite), ("hooks", "report", ReportHooks)]
)
def test_the_registry_finds_them(kind: str, name: str, factory: type) -> None:
    registry = Registry()
    assert registry.load(kind, f"lwm-evals:{name}") is factory
    assert registry.spec(kind, f"lwm-evals:{name}").probe is None


def test_the_needle_options_are_the_suites_own() -> None:
    assert plugin_options_model(Registry(), "eval", "lwm-evals:needle") is NeedleOptions
