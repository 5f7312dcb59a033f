"""What a plugin says about itself: kinds, their entry-point groups, and the light ``PluginSpec``.

Standard library only: every plugin's ``_lwm.py`` imports this file, and ``lwm plugins show`` pays for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from lwm_core.errors import PluginError

Framework = Literal["jax", "torch"]
Capability = tuple[str, ...] | int | bool | float

#: Kind → entry-point group, in the order in which people read them. The API's major version is part of the group.
KINDS: Mapping[str, str] = MappingProxyType(
    {
        kind: f"lwm.{kind}.v1"
        for kind in (
            "attention", "tokenizer", "encoder", "media", "trainer", "context", "data", "eval", "weights", "hooks",
            "cli",
        )
    }
)  # fmt: skip

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_IDENTIFIER = r"[A-Za-z_]\w*"
_PATH = re.compile(rf"{_IDENTIFIER}(\.{_IDENTIFIER})*:{_IDENTIFIER}(\.{_IDENTIFIER})*")
_MODULE = re.compile(_IDENTIFIER)
_CAPABILITY = re.compile(r"[a-z][a-z0-9_]*")


def is_plugin_name(name: str) -> bool:
    """Whether ``name`` is kebab-case, as every plugin's name is (``jax-ring``)."""
    return _NAME.fullmatch(name) is not None


def is_import_path(path: str) -> bool:
    """Whether ``path`` has the form ``package.module:attribute``."""
    return _PATH.fullmatch(path) is not None


@dataclass(frozen=True, kw_only=True)
class PluginSpec:
    """A plugin in words, so that it can be listed, explained and chosen before anything heavy is imported.

    An entry point of a group of :data:`KINDS` names an instance of this class in a module that imports neither
    numpy nor a framework (by convention ``<package>._lwm``).

    Args:
        name: kebab-case; equals the entry point's name.
        summary: one line for people.
        factory: ``module:attribute`` of what the kind asks for; imported only when the plugin is used.
        options: ``module:attribute`` of a pydantic model with ``extra="forbid"``; none: the plugin takes no options.
        needs: top-level modules that must be installed (``("jax",)``).
        framework: ``"jax"``, ``"torch"``, or none for a plugin that works with either.
        devices: device kinds it runs on (``("cpu", "tpu")``); empty: not stated.
        capabilities: what it can do. A tuple of words is what it supports, a bool says whether it has a feature,
            a number is a limit (``max_head_dim``). For attention: masks, gqa, dtypes, devices, strategies, layouts,
            max_head_dim; they are stated nowhere else.
        priority: among plugins that fit, ``auto`` takes the highest.
        probe: ``module:attribute`` of a function without arguments that returns the reasons why the plugin cannot
            be used on this machine; nothing (none, ``""`` or an empty list) where it can.

    Raises:
        PluginError: a field is malformed; the message names it.
    """

    name: str
    summary: str
    factory: str
    options: str | None = None
    needs: tuple[str, ...] = ()
    framework: Framework | None = None
    devices: tuple[str, ...] = ()
    capabilities: Mapping[str, Capability] = field(default_factory=dict)
    priority: int = 0
    probe: str | None = None

    def __post_init__(self) -> None:
        self._check(isinstance(self.name, str) and is_plugin_name(self.name), "name", self.name, "kebab-case")
        self._check(
            isinstance(self.summary, str) and bool(self.summary.strip()) and "\n" not in self.summary,
            "summary", self.summary, "one line of text",
        )  # fmt: skip
        for name in ("factory", "options", "probe"):
            path = getattr(self, name)
            optional = name != "factory" and path is None
            self._check(optional or (isinstance(path, str) and is_import_path(path)), name, path, "'module:attribute'")
        self._check(_words(self.needs) and all(map(_MODULE.fullmatch, self.needs)), "needs", self.needs,
                    "a tuple of top-level module names")  # fmt: skip
        self._check(self.framework in ("jax", "torch", None), "framework", self.framework, "'jax', 'torch' or None")
        self._check(_words(self.devices), "devices", self.devices, "a tuple of words")
        self._check(type(self.priority) is int, "priority", self.priority, "an integer")
        self._check_capabilities()
        # A private copy: the spec stays as it was checked, whatever becomes of the plugin's own dictionary.
        object.__setattr__(self, "capabilities", MappingProxyType(dict(self.capabilities)))

    def __hash__(self) -> int:
        return hash((self.name, self.factory))

    def capability(self, name: str) -> Capability | None:
        """The stated capability ``name``, ``devices`` and ``framework`` included; none where it is not stated."""
        if name == "framework":
            return None if self.framework is None else (self.framework,)
        if name == "devices" and self.devices:
            return self.devices
        return self.capabilities.get(name)

    def _check_capabilities(self) -> None:
        self._check(isinstance(self.capabilities, Mapping), "capabilities", self.capabilities, "a mapping")
        for name, value in self.capabilities.items():
            self._check(isinstance(name, str) and _CAPABILITY.fullmatch(name) is not None,
                        "capabilities", name, "names in snake_case")  # fmt: skip
            self._check(isinstance(value, (bool, int, float)) or _words(value),
                        f"capabilities[{name!r}]", value, "a tuple of words, a number or a bool")  # fmt: skip
        twice = "framework" in self.capabilities or ("devices" in self.capabilities and bool(self.devices))
        self._check(not twice, "capabilities", "framework or devices said twice", "each fact in one place")

    def _check(self, good: bool, field_name: str, got: object, expected: str) -> None:
        if not good:
            raise PluginError(f"PluginSpec {self.name!r}: {field_name}: got {got!r}, expected {expected}")


def _words(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(word, str) and word for word in value)
