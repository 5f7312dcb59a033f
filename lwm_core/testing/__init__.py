"""The conformance kits: what a plugin's author runs to know that the plugin is right.

A plugin's tests subclass the kit of its kind and name the plugin; ``lwm plugins check NAME`` runs the same::

    from lwm_core.testing import AttentionSuite

    class TestRing(AttentionSuite):
        name = "jax-ring"
        options = {"strategy": "ring"}

The suites need pytest; :func:`attention_harness` and the tolerance helper need numpy alone.
"""

from __future__ import annotations

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


def __getattr__(name: str) -> object:
    if name not in _SUITES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import pytest

    # An installed suite's asserts tell what they compared only when pytest rewrites them.
    pytest.register_assert_rewrite(f"{__name__}.suite", *(f"{__name__}.{module}" for module in set(_SUITES.values())))
    value: object = getattr(import_module(f"{__name__}.{_SUITES[name]}"), name)
    globals()[name] = value
    return value
