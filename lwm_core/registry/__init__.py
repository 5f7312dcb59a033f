"""The plugin registry: what is installed, what is meant by a name, what ``auto`` takes, and why.

Standard library only until a name that needs more is used: ``hookimpl`` and its like import pluggy, the options
functions import pydantic.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from lwm_core.registry.catalogue import KNOWN
from lwm_core.registry.scan import Candidate, State, refresh
from lwm_core.registry.select import AUTO, Choice, Registry
from lwm_core.registry.spec import KINDS, PluginSpec

if TYPE_CHECKING:
    from lwm_core.registry.hooks import HookManager, HookSpecs, PluginWarning, hookimpl, hookspec, load_hooks
    from lwm_core.registry.options import NoOptions, options_schema, plugin_options_model, validate_options

_LAZY = {
    **dict.fromkeys(("HookManager", "HookSpecs", "PluginWarning", "hookimpl", "hookspec", "load_hooks"), "hooks"),
    **dict.fromkeys(("NoOptions", "options_schema", "plugin_options_model", "validate_options"), "options"),
}

__all__ = [
    "AUTO",
    "KINDS",
    "KNOWN",
    "Candidate",
    "Choice",
    "HookManager",
    "HookSpecs",
    "NoOptions",
    "PluginSpec",
    "PluginWarning",
    "Registry",
    "State",
    "hookimpl",
    "hookspec",
    "load_hooks",
    "options_schema",
    "plugin_options_model",
    "refresh",
    "validate_options",
]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value
