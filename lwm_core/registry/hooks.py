"""Lifecycle hooks: what *all* plugins may hear. Every hook is declared and documented in :class:`HookSpecs`.

A plugin of the group ``lwm.hooks.v1`` names a ``PluginSpec`` whose factory is an object with ``@hookimpl`` methods:
a module, an instance, or a class, which is then made with its validated options (or without arguments).

A hook never ends a run. Whatever a plugin raises, on loading or when called, becomes a :class:`PluginWarning` that
names the plugin; from its first exception on, none of that plugin's hooks is called again in this process.
``LWM_PLUGINS_STRICT=1`` lets the exception out instead. Wrappers (``wrapper=True``) are refused: code around other
plugins' hooks could not be kept apart from theirs.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pluggy

from lwm_core.errors import LwmError, PluginError
from lwm_core.registry.catalogue import near_miss
from lwm_core.registry.loading import PLUGIN_FAULTS, first_line, formatted, strict
from lwm_core.registry.scan import Candidate
from lwm_core.registry.select import Registry

PROJECT = "lwm"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class PluginWarning(UserWarning):
    """A hooks plugin failed, or offers a hook that does not exist; the run goes on without it."""


class HookSpecs:
    """The hooks. An implementation may take fewer arguments than its hook offers; new ones may come in a minor."""

    @hookspec(historic=True)
    def lwm_configure(self, config: object) -> None:
        """The resolved configuration, once it is valid; also told to plugins that are registered later."""

    @hookspec(firstresult=True)
    def lwm_select(self, kind: str, candidates: tuple[Candidate, ...]) -> Sequence[Candidate] | None:
        """The candidates of a choice that may be used, best first.

        Asked for ``auto`` with all that fit, best first, and for a named choice with that one. An empty answer vetoes
        them all, ``None`` has no opinion; the first answer that is not ``None`` counts.
        """

    @hookspec
    def lwm_run_start(self, run: object) -> None:
        """A run begins or resumes; nothing has been trained yet."""

    @hookspec
    def lwm_run_end(self, run: object, status: str) -> None:
        """A run ends with ``status``: ``done``, ``stopped`` (a signal) or ``failed``."""

    @hookspec
    def lwm_stage_change(self, run: object, old: object | None, new: object) -> None:
        """A stage begins; ``old`` is none for the first."""

    @hookspec
    def lwm_step_end(self, run: object, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done and its metrics are on the host. Called outside of any jit; it should be quick."""

    @hookspec
    def lwm_checkpoint(self, run: object, path: Path) -> None:
        """A checkpoint is complete: its manifest has been written to ``path``."""

    @hookspec(firstresult=True)
    def lwm_report(self, run: object) -> Path | None:
        """Write a report of the run and return its path; the first plugin that does counts."""


class _Guarded:
    """What pluggy registers in a plugin's place: its hooks, each behind a guard."""

    def __init__(self, label: str, plugin: object, manager: HookManager) -> None:
        self._label = label
        self._plugin = plugin
        self._manager = manager
        self._off = False

    def guard(self, hook: str, function: Callable[..., object], options: object) -> None:
        """Offer ``function`` as ``hook`` under pluggy's options for it."""

        @functools.wraps(function)
        def call(*args: object, **kwargs: object) -> object:
            if self._off:
                return None
            try:
                return function(*args, **kwargs)
            except PLUGIN_FAULTS as error:
                if strict():
                    raise
                self._off = True
                self._manager.tell(self._label, f"{hook} raised {first_line(error)}; its hooks are off now", error)
                return None

        setattr(call, f"{PROJECT}_impl", options)
        setattr(self, hook, call)


class HookManager:
    """The registered hooks plugins. ``hook`` calls them: ``hooks.hook.lwm_step_end(run=…, step=…, metrics=…)``.

    ``failed`` holds, by ``dist:name``, why a plugin was not loaded or was switched off.
    """

    def __init__(self) -> None:
        self._pluggy = pluggy.PluginManager(PROJECT)
        self._pluggy.add_hookspecs(HookSpecs)
        self._plugins: dict[str, _Guarded] = {}
        self.failed: dict[str, str] = {}

    @property
    def hook(self) -> Any:
        """The caller of hooks by name (pluggy's relay; its calls are untyped)."""
        return self._pluggy.hook

    @property
    def names(self) -> tuple[str, ...]:
        """The registered plugins, ``dist:name``, in the order of registration."""
        return tuple(self._plugins)

    def configure(self, config: object) -> None:
        """Call ``lwm_configure`` now and for every plugin that is registered later."""
        self.hook.lwm_configure.call_historic(kwargs={"config": config})

    def select(self, kind: str, candidates: tuple[Candidate, ...]) -> Sequence[Candidate] | None:
        """Ask ``lwm_select``; fits :meth:`Registry.choose`'s ``select``."""
        return cast("Sequence[Candidate] | None", self.hook.lwm_select(kind=kind, candidates=candidates))

    def register(self, plugin: object, label: str) -> None:
        """Register an object's ``@hookimpl`` methods under ``label``; on failure nothing of it stays registered.

        Raises:
            PluginError: it has no hooks, a hook has an argument its spec lacks, or a hook is a wrapper.
        """
        guarded = _Guarded(label, plugin, self)
        hooks = 0
        for attribute in dir(plugin):
            options = self._pluggy.parse_hookimpl_opts(plugin, attribute)
            if options is None:
                continue
            if options.get("wrapper") or options.get("hookwrapper"):
                raise PluginError(f"hooks plugin {label}: {attribute} is a wrapper; expected a plain hook")
            guarded.guard(options.get("specname") or attribute, getattr(plugin, attribute), options)
            hooks += 1
        if not hooks:
            raise PluginError(f"hooks plugin {label}: got {plugin!r}, expected an object with @hookimpl methods")
        try:
            self._pluggy.register(guarded, name=label)
        except (pluggy.PluginValidationError, ValueError) as error:
            if self._pluggy.get_plugin(label) is guarded:  # older pluggy adds hook by hook before it refuses one
                self._pluggy.unregister(guarded)
            reason = " ".join(str(error).split())
            raise PluginError(f"hooks plugin {label}: {reason}", details=formatted(error)) from error
        self._plugins[label] = guarded

    def check_pending(self) -> list[str]:
        """Name every hook that will never be called: misspelt, or without ``@hookimpl``. Each is also warned of."""
        known = [name for name in dir(HookSpecs) if name.startswith("lwm_")]
        problems = []
        for label, guarded in self._plugins.items():
            for caller in self._pluggy.get_hookcallers(guarded) or []:
                optional = any(i.optionalhook for i in caller.get_hookimpls() if i.plugin is guarded)
                if caller.name not in known and not optional:
                    near = near_miss(caller.name, known)
                    hint = f"; did you mean {near!r}?" if near else f" (hooks: {', '.join(known)})"
                    problems.append(f"hooks plugin {label}: there is no hook {caller.name!r}{hint}")
            unmarked = [name for name in known if hasattr(guarded._plugin, name) and not hasattr(guarded, name)]
            for name in unmarked:
                if not hasattr(getattr(guarded._plugin, name), f"{PROJECT}_spec"):
                    problems.append(f"hooks plugin {label}: {name} is never called; mark it with @hookimpl")
        for problem in problems:
            warnings.warn(problem, PluginWarning, stacklevel=2)
        return problems

    def tell(self, label: str, reason: str, error: BaseException | None = None) -> None:
        """Record why a plugin is out, and warn of it; the run goes on."""
        self.failed[label] = reason
        warning = PluginWarning(f"hooks plugin {label}: {reason}")
        warning.__cause__ = error
        warnings.warn(warning, stacklevel=3)


def load_hooks(registry: Registry, options: Mapping[str, Mapping[str, object]] | None = None) -> HookManager:
    """Register every installed hooks plugin that the registry allows, one at a time.

    Args:
        registry: where the plugins come from.
        options: tables by ``name`` or ``dist:name``, for factories that are classes with an options model.

    Returns:
        the manager; a plugin that could not be loaded is told as a :class:`PluginWarning` and stands in ``failed``.

    Raises:
        pydantic.ValidationError: an options table is wrong; that is the configuration's fault, not the plugin's.
    """
    manager = HookManager()
    for candidate in registry.candidates("hooks"):
        if candidate.state in ("disabled", "shadowed"):
            continue
        try:
            if candidate.state == "incompatible":
                raise PluginError(candidate.reason)
            table = (options or {}).get(candidate.label, (options or {}).get(candidate.name, {}))
            plugin = _make(registry, candidate, table)
            manager.register(plugin, candidate.label)
        except LwmError as error:
            if strict():
                raise
            manager.tell(candidate.label, f"not loaded ({candidate.origin}): {error}", error)
    return manager


def _make(registry: Registry, candidate: Candidate, table: Mapping[str, object]) -> object:
    """The object that carries the hooks: the factory itself, or an instance where it is a class."""
    from lwm_core.registry.options import validate_options

    spec = registry.spec("hooks", candidate.label)
    options = validate_options(registry, "hooks", candidate.label, table)
    factory = registry.load("hooks", candidate.label)
    if not isinstance(factory, type):
        return factory
    try:
        return factory(options) if spec.options is not None else factory()
    except PLUGIN_FAULTS as error:
        if strict():
            raise
        raise PluginError(f"{factory.__name__}() raised {first_line(error)}", details=formatted(error)) from error
