"""The conformance kit of every plugin, whatever its kind: light to list, honest to describe, possible to load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import ClassVar

from lwm_core.registry import Registry
from lwm_core.registry.options import options_schema, plugin_options_model
from lwm_core.testing.suite import Suite

#: What the import of a light spec must not load.
HEAVY = ("numpy", "jax", "jaxlib", "torch", "flax", "pydantic", "tokenizers", "transformers", "matplotlib", "grain")

_PROBE = """
import importlib, json, sys
module, _, attribute = sys.argv[1].partition(":")
spec = getattr(importlib.import_module(module), attribute)
print(json.dumps([type(spec).__name__, spec.name, sorted(set(sys.modules) & set(sys.argv[2:]))]))
"""


class PluginSuite(Suite):
    """Subclass it once a plugin.

    Attributes:
        kind: the plugin's kind (``attention``).
        name: ``name`` or ``dist:name``.
    """

    kind: ClassVar[str]
    name: ClassVar[str]

    def test_it_is_offered_once_and_nothing_speaks_against_it(self) -> None:
        """Installed, available, loadable; its probe has no objection on this machine."""
        candidate = Registry.from_environment().check(self.kind, self.name)
        assert candidate.state == "available", f"{candidate.label} is {candidate.state}: {candidate.reason}"

    def test_its_spec_is_light(self) -> None:
        """Importing the module that holds the spec, in a process of its own, loads nothing heavy."""
        plain = self.name.rpartition(":")[2]
        value = next(
            c.value
            for c in Registry.from_environment().candidates(self.kind)
            if self.name in (c.name, c.label) and c.state != "shadowed"
        )
        result = subprocess.run(
            [sys.executable, "-c", _PROBE, value, *HEAVY],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
        )
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout) == ["PluginSpec", plain, []]

    def test_its_modules_are_named_in_full(self) -> None:
        """A framework's plugin says that it needs the framework, so that its absence is told before the import."""
        spec = Registry.from_environment().spec(self.kind, self.name)
        named = spec.framework is None or spec.framework in spec.needs
        assert named, f"framework {spec.framework!r} is not among needs {spec.needs}"

    def test_its_options_describe_themselves(self) -> None:
        """Every option has a description and its defaults are valid; the schema survives JSON."""
        registry = Registry.from_environment()
        schema = options_schema(registry, self.kind, self.name)
        assert json.loads(json.dumps(schema)) == schema
        model = plugin_options_model(registry, self.kind, self.name)
        silent = [name for name, field in model.model_fields.items() if not field.description]
        assert not silent, f"options without a description: {', '.join(silent)}"
        if all(not field.is_required() for field in model.model_fields.values()):
            defaults = model.model_validate({})
            assert model.model_validate(defaults.model_dump(mode="json")) == defaults

    def test_its_factory_can_be_called(self) -> None:
        """The factory is importable and is what its kind asks for: an attention factory has three methods."""
        factory = Registry.from_environment().load(self.kind, self.name)
        if self.kind == "attention":
            methods = ("layout", "build", "harness")
            missing = [method for method in methods if not callable(getattr(factory, method, None))]
            assert not missing, f"the attention factory lacks {', '.join(missing)}"
        elif self.kind != "hooks":
            assert callable(factory)
