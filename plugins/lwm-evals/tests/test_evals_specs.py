"""What the distribution says of itself: it is light, and the registry finds what it names."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lwm_core.registry import Registry, plugin_options_model
from lwm_evals import (
    NeedleOptions,
    NeedleSuite,
    ReconstructionSuite,
    VideoContinuationSuite,
    VideoLossSuite,
    VideoNeedleSuite,
)
from lwm_evals.hooks import ReportHooks


def test_specs_import_nothing_heavy() -> None:
    code = (
        "import sys, lwm_evals._lwm\n"
        "print(sorted({'numpy', 'matplotlib', 'jinja2', 'pydantic', 'jax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("kind", "name", "factory"),
    [
        ("eval", "needle", NeedleSuite), ("eval", "video-needle", VideoNeedleSuite),
        ("eval", "video-loss", VideoLossSuite), ("eval", "reconstruction", ReconstructionSuite),
        ("eval", "video-continuation", VideoContinuationSuite), ("hooks", "report", ReportHooks),
    ],
)  # fmt: skip
def test_the_registry_finds_them(kind: str, name: str, factory: type) -> None:
    registry = Registry()
    assert registry.load(kind, f"lwm-evals:{name}") is factory
    assert registry.spec(kind, f"lwm-evals:{name}").probe is None


def test_suites_that_need_the_encoder_say_so() -> None:
    registry = Registry()
    suites = [one for one in registry.candidates("eval") if one.dist == "lwm-evals"]
    told = {one.name: registry.spec("eval", one.label).capability("encoder") is True for one in suites}
    assert told == {
        "needle": False, "reconstruction": True, "video-continuation": True, "video-loss": False, "video-needle": True,
    }  # fmt: skip


def test_the_needle_options_are_the_suites_own() -> None:
    assert plugin_options_model(Registry(), "eval", "lwm-evals:needle") is NeedleOptions
