"""The conformance kits: what a plugin's author runs to know that the plugin is right.

A plugin's tests subclass the kit of its kind and name the plugin::

    from lwm_core.testing import AttentionSuite

    class TestRing(AttentionSuite):
        name = "jax-ring"
        options = {"strategy": "ring"}

The suites need pytest; :func:`attention_harness` and the tolerance helper need numpy alone.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from lwm_core.testing.harness import WorkerError, attention_harness, close_workers
from lwm_core.testing.tolerance import TOLERANCES, assert_close, assert_no_worse, relative_l2

if TYPE_CHECKING:
    from lwm_core.testing.attention_suite import AttentionSuite
    from lwm_core.testing.data_suite import DataSuite, WeightsSuite
    from lwm_core.testing.registry_suite import PluginSuite
    from lwm_core.testing.tokenizer_suite import TokenizerSuite

_SUITES = {
    "AttentionSuite": "attention_suite",
    "DataSuite": "data_suite",
    "WeightsSuite": "data_suite",
    "PluginSuite": "registry_suite",
    "TokenizerSuite": "tokenizer_suite",
}

__all__ = [
    "AttentionSuite",
    "DataSuite",
    "PluginSuite",
    "TOLERANCES",
    "TokenizerSuite",
    "WeightsSuite",
    "WorkerError",
    "assert_close",
    "assert_no_worse",
    "attention_harness",
    "close_workers",
    "relative_l2",
]


def _rewrite_asserts() -> None:
    """An installed suite's asserts tell what they compared only when pytest rewrites them, before they are imported."""
    import pytest

    modules = {f"{__name__}.{module}" for module in ("suite", *_SUITES.values())}
    pytest.register_assert_rewrite(*sorted(modules - sys.modules.keys()))


# Under pytest at once: a test may import a suite's module itself, and not through this package.
if sys.modules.get("pytest") is not None:
    _rewrite_asserts()


def __getattr__(name: str) -> object:
    if name not in _SUITES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _rewrite_asserts()
    value: object = getattr(import_module(f"{__name__}.{_SUITES[name]}"), name)
    globals()[name] = value
    return value
