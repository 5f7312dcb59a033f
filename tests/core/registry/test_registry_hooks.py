"""Hooks: guarded loading one plugin at a time, misspelt hooks, and a hook that raises does not end a run."""

from __future__ import annotations

import warnings

import pytest

from lwm_core.errors import PluginError
from lwm_core.registry import HookManager, PluginWarning, hookimpl, load_hooks

SPEC = """
from lwm_core.registry import PluginSpec
spec = PluginSpec(name={name!r}, summary="x", factory="{module}_impl:{attribute}", {fields})
"""


def _plant(garden, name: str, impl: str, attribute: str = "Hooks", fields: str = "") -> None:
    module = "acme_" + name
    garden.plant(
        f"acme-{name}",
        {"hooks": {name: f"{module}:spec"}},
        {module: SPEC.format(name=name, module=module, attribute=attribute, fields=fields), f"{module}_impl": impl},
    )


GOOD = """
from lwm_core.registry import hookimpl
heard = []
class Hooks:
    @hookimpl
    def lwm_step_end(self, step):
        heard.append(step)
"""


def test_one_plugin_that_cannot_be_loaded_stops_nobody(garden) -> None:
    _plant(garden, "aaa", "1 / 0")
    _plant(garden, "bbb", "class Hooks:\n    def __init__(self):\n        raise OSError('no disk')\n")
    _plant(
        garden, "ccc",
        "from lwm_core.registry import hookimpl\nclass Hooks:\n"
        "    @hookimpl\n    def lwm_run_start(self, run): raise AssertionError('half registered')\n"
        "    @hookimpl\n    def lwm_step_end(self, stepp): pass\n",
    )  # fmt: skip
    _plant(garden, "ddd", "class Hooks: pass\n")
    _plant(
        garden, "eee",
        "from lwm_core.registry import hookimpl\nclass Hooks:\n"
        "    @hookimpl(wrapper=True)\n    def lwm_step_end(self):\n        return (yield)\n",
    )  # fmt: skip
    _plant(garden, "fff", GOOD)
    with pytest.warns(PluginWarning) as told:
        hooks = load_hooks(garden.registry())
    assert hooks.names == ("acme-fff:fff",)
    reasons = {
        "acme-aaa:aaa": "ZeroDivisionError",
        "acme-bbb:bbb": "OSError: no disk",
        "acme-ccc:ccc": "stepp",
        "acme-ddd:ddd": "expected an object with @hookimpl methods",
        "acme-eee:eee": "lwm_step_end is a wrapper",
    }
    assert hooks.failed.keys() == reasons.keys()
    for label, reason in reasons.items():
        assert reason in hooks.failed[label] and f"{label.partition(':')[0]} 1.0.0" in hooks.failed[label]
        assert any(label in str(warning.message) for warning in told)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hooks.hook.lwm_run_start(run=None)  # nothing of the refused plugins is left
        hooks.hook.lwm_step_end(run=None, step=3, metrics={})
    import acme_fff_impl

    assert acme_fff_impl.heard == [3]


@pytest.mark.parametrize(
    ("impl", "attribute"),
    [
        (GOOD, "Hooks"),
        (GOOD + "instance = Hooks()\n", "instance"),
        ("import types\nfrom lwm_core.registry import hookimpl\nheard = []\n@hookimpl\ndef lwm_step_end(run, step):\n"
         "    heard.append(step)\nimport sys\nmodule = sys.modules[__name__]\n", "module"),
        (GOOD.replace("    @hookimpl\n    def lwm_step_end(self, step)",
                      "    @staticmethod\n    @hookimpl\n    def lwm_step_end(step)"), "Hooks"),
        (GOOD.replace("    @hookimpl\n    def lwm_step_end(self",
                      "    @hookimpl(specname='lwm_step_end')\n    def other(self"), "Hooks"),
    ],
)  # fmt: skip
def test_classes_instances_and_modules(garden, impl: str, attribute: str) -> None:
    _plant(garden, "one", impl, attribute)
    hooks = load_hooks(garden.registry())
    assert hooks.failed == {} and hooks.check_pending() == []
    hooks.hook.lwm_step_end(run=None, step=4, metrics={"loss": 1.0})
    import acme_one_impl

    assert acme_one_impl.heard == [4]


def test_a_class_gets_its_options(garden) -> None:
    impl = """
from pydantic import BaseModel, ConfigDict
from lwm_core.registry import hookimpl
class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")
    every: int = 10
class Hooks:
    def __init__(self, options): self.options = options
    @hookimpl
    def lwm_report(self, run): return self.options.every
"""
    _plant(garden, "opt", impl, fields="options='acme_opt_impl:Options'")
    registry = garden.registry()
    assert load_hooks(registry).hook.lwm_report(run=None) == 10
    assert load_hooks(registry, {"opt": {"every": 3}}).hook.lwm_report(run=None) == 3
    with pytest.raises(ValueError, match="evry"):
        load_hooks(registry, {"opt": {"evry": 3}})


def test_disabled_hooks_are_not_loaded_and_incompatible_ones_are_told(garden) -> None:
    _plant(garden, "aaa", GOOD)
    registry = garden.registry(deny=["acme-aaa"])
    hooks = load_hooks(registry)
    assert hooks.names == () and hooks.failed == {}


def test_misspelt_and_unmarked_hooks_are_told() -> None:
    class Plugin:
        @hookimpl
        def lwm_step_ends(self, step: int) -> None: ...

        @hookimpl(optionalhook=True)
        def lwm_of_the_future(self) -> None: ...

        def lwm_run_start(self, run: object) -> None: ...

    hooks = HookManager()
    hooks.register(Plugin(), "acme:typo")
    with pytest.warns(PluginWarning):
        problems = hooks.check_pending()
    assert problems == [
        "hooks plugin acme:typo: there is no hook 'lwm_step_ends'; did you mean 'lwm_step_end'?",
        "hooks plugin acme:typo: lwm_run_start is never called; mark it with @hookimpl",
    ]


class _Raises:
    def __init__(self) -> None:
        self.calls = 0

    @hookimpl
    def lwm_step_end(self, step: int) -> None:
        self.calls += 1
        raise RuntimeError(f"step {step}\nmore")

    @hookimpl(tryfirst=True)
    def lwm_report(self, run: object) -> str:
        self.calls += 1
        return "of the plugin that is off"


class _Hears:
    def __init__(self) -> None:
        self.steps: list[int] = []

    @hookimpl
    def lwm_step_end(self, step: int) -> None:
        self.steps.append(step)

    @hookimpl
    def lwm_report(self, run: object) -> str:
        return "report"


@pytest.mark.parametrize("raises_first", [True, False])
def test_a_hook_that_raises_is_told_once_and_switched_off(raises_first: bool) -> None:
    raising, hearing = _Raises(), _Hears()
    hooks = HookManager()
    plugins = [(hearing, "acme:hears"), (raising, "acme:raises")]
    for plugin, label in plugins if raises_first else plugins[::-1]:  # pluggy calls the newest first
        hooks.register(plugin, label)
    with pytest.warns(PluginWarning) as told:
        hooks.hook.lwm_step_end(run=None, step=1, metrics={})
    assert len(told) == 1
    assert str(told[0].message) == (
        "hooks plugin acme:raises: lwm_step_end raised RuntimeError: step 1; its hooks are off now"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hooks.hook.lwm_step_end(run=None, step=2, metrics={})
        assert hooks.hook.lwm_report(run=None) == "report"
    assert hearing.steps == [1, 2] and raising.calls == 1
    assert "RuntimeError" in hooks.failed["acme:raises"]


def test_ctrl_c_in_a_hook_is_not_swallowed() -> None:
    class Plugin:
        @hookimpl
        def lwm_run_start(self) -> None:
            raise KeyboardInterrupt

    hooks = HookManager()
    hooks.register(Plugin(), "acme:c")
    with pytest.raises(KeyboardInterrupt):
        hooks.hook.lwm_run_start(run=None)
    assert hooks.failed == {}


def test_strict_lets_a_hooks_exception_out(monkeypatch) -> None:
    hooks = HookManager()
    hooks.register(_Raises(), "acme:raises")
    monkeypatch.setenv("LWM_PLUGINS_STRICT", "1")
    with pytest.raises(RuntimeError, match="step 1"):
        hooks.hook.lwm_step_end(run=None, step=1, metrics={})


def test_configure_reaches_plugins_that_come_late() -> None:
    class Plugin:
        @hookimpl
        def lwm_configure(self, config: object) -> None:
            self.config = config

    early, late = Plugin(), Plugin()
    hooks = HookManager()
    hooks.register(early, "acme:early")
    hooks.configure({"a": 1})
    hooks.register(late, "acme:late")
    assert early.config == late.config == {"a": 1}


def test_select_answers_through_the_manager(garden) -> None:
    garden.attention("acme-a", "acme_a", "a", "priority=5")
    garden.attention("acme-b", "acme_b", "b")

    class Plugin:
        @hookimpl
        def lwm_select(self, kind: str, candidates: tuple) -> list | None:
            return [c for c in candidates if c.dist == "acme-b"] if kind == "attention" else None

    hooks = HookManager()
    registry = garden.registry()
    assert registry.choose("attention", "auto", select=hooks.select).spec.name == "a"
    hooks.register(Plugin(), "acme:picky")
    assert registry.choose("attention", "auto", select=hooks.select).spec.name == "b"
    with pytest.raises(PluginError, match="vetoed"):
        registry.choose("attention", "a", select=hooks.select)
