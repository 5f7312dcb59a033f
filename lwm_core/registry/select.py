"""The registry: which plugins are offered, which is meant by a name, which ``auto`` takes, and why.

One plugin's fault stays its own: whatever a plugin raises becomes that candidate's state and, on use, a
:class:`~lwm_core.errors.PluginError` that names plugin, distribution and version.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NoReturn

from lwm_core.errors import PluginError, UnsupportedError
from lwm_core.registry import compat, scan
from lwm_core.registry.loading import (
    PLUGIN_FAULTS,
    first_line,
    formatted,
    import_path,
    missing_needs,
    probe_reasons,
    strict,
)
from lwm_core.registry.messages import ambiguous, check_kind, kept_out, nothing_fits, unknown, unusable, who, why_after
from lwm_core.registry.requirements import unmet
from lwm_core.registry.scan import CORE_DIST, Candidate, State, normalise
from lwm_core.registry.spec import PluginSpec

AUTO = "auto"

#: A veto over a choice (the hook ``lwm_select``): the candidates that may be used, best first; none has no opinion.
Select = Callable[[str, tuple[Candidate, ...]], Sequence[Candidate] | None]


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why each other was not: ``rejected`` holds (name, reason) in a stable order."""

    candidate: Candidate
    spec: PluginSpec
    rejected: list[tuple[str, str]]

    def explain(self) -> str:
        """One line: ``attention=jax-ring (lwm-jax-ring 0.1.0); rejected torch-ring: needs torch, …``."""
        c = self.candidate
        rejected = "; ".join(f"{name}: {reason}" for name, reason in self.rejected)
        return f"{c.kind}={c.name} ({c.origin})" + (f"; rejected {rejected}" if rejected else "")


@dataclass(frozen=True)
class _Rule:
    """An allow or deny list of distributions, and where it was given."""

    dists: frozenset[str]
    allow: bool
    source: str

    def reason_against(self, dist: str) -> str:
        if dist == CORE_DIST or (dist in self.dists) == self.allow:
            return ""
        return f"{dist} is {'not on the allow list' if self.allow else 'turned off by'} {self.source}"


@dataclass
class _Entry:
    """A candidate and what has been imported of it so far."""

    candidate: Candidate
    judged: bool = False
    probed: bool = False
    spec: PluginSpec | None = None

    def mark(self, state: State, reason: str, traceback: str = "") -> None:
        self.candidate = replace(self.candidate, state=state, reason=reason, traceback=traceback)

    @property
    def offered(self) -> bool:
        """Whether the name counts as offered: what is broken or unusable still claims it."""
        return self.candidate.state in ("available", "broken", "unusable")


class Registry:
    """The installed plugins under allow and deny lists of distributions.

    Args:
        allow: distributions whose plugins may be used; none: all. ``lwm-core``'s own are always allowed.
        deny: distributions whose plugins may not be used.
        found: candidates to start from instead of the process's scan (tests, workers).
    """

    def __init__(
        self, allow: Iterable[str] | None = None, deny: Iterable[str] = (), *, found: Iterable[Candidate] | None = None
    ) -> None:
        self._rules: list[_Rule] = []
        if allow is not None:
            self._add_rule(allow, True, "[plugins] allow")
        self._add_rule(deny, False, "[plugins] deny")
        candidates = scan.installed() if found is None else tuple(sorted(found, key=scan.sort_key))
        self._entries = [_Entry(candidate) for candidate in candidates]

    @classmethod
    def from_environment(
        cls,
        config_allow: Iterable[str] | None = None,
        config_deny: Iterable[str] = (),
        no_plugins: bool = False,
        *,
        found: Iterable[Candidate] | None = None,
    ) -> Registry:
        """A registry under the configuration's lists, ``LWM_PLUGINS``, ``LWM_PLUGINS_DISABLE`` and ``--no-plugins``.

        The variables are comma lists of distributions. A plugin must pass every list that is given; an allow list
        that is set but empty allows nothing but ``lwm-core``.
        """
        registry = cls(config_allow, config_deny, found=found)
        for variable, allow in (("LWM_PLUGINS", True), ("LWM_PLUGINS_DISABLE", False)):
            if variable in os.environ:
                registry._add_rule(os.environ[variable].split(","), allow, variable)
        if no_plugins:
            registry._add_rule((), True, "of --no-plugins, which is empty")
        return registry

    def _add_rule(self, dists: Iterable[str], allow: bool, source: str) -> None:
        self._rules.append(_Rule(frozenset(normalise(dist) for dist in dists if dist.strip()), allow, source))

    # What is offered.

    def candidates(self, kind: str | None = None) -> tuple[Candidate, ...]:
        """The candidates of a kind (or all) with the states known so far. Runs no plugin code.

        Raises:
            PluginError: ``kind`` is no kind.
        """
        if kind is not None:
            check_kind(kind)
        return tuple(self._judged(e).candidate for e in self._entries if kind is None or e.candidate.kind == kind)

    def spec(self, kind: str, name: str) -> PluginSpec:
        """The light spec of the plugin ``name`` (or ``dist:name``), imported on first use.

        Raises:
            PluginError: the name is unknown, not installed, ambiguous, or its plugin cannot be used.
        """
        return self._spec(self._entry(kind, name))

    def load(self, kind: str, name: str) -> object:
        """The factory object of the plugin ``name`` (or ``dist:name``), imported on first use.

        Raises:
            PluginError: as for :meth:`spec`; a needed module is missing; the import failed (``details`` holds the
                traceback).
        """
        entry = self._entry(kind, name)
        spec = self._spec(entry)
        self._check_needs(entry, spec)
        return self._import(entry, spec.factory)

    def resolve(self, kind: str, name: str, what: Literal["options", "probe"]) -> object | None:
        """The object behind another of a spec's import paths; none where the spec states none."""
        entry = self._entry(kind, name)
        path = getattr(self._spec(entry), what)
        return None if path is None else self._import(entry, path)

    def check(self, kind: str, name: str) -> Candidate:
        """Import everything a plugin names, run its probe, and return its candidate with the state that comes out."""
        entry = self._entry(kind, name)
        try:
            spec = self._spec(entry)
            self._check_here(entry, spec)
            for path in (spec.factory, spec.options):
                if path is not None:
                    self._import(entry, path)
        except PluginError:
            if strict():
                raise
        return entry.candidate

    # Choosing.

    def choose(
        self, kind: str, name: str, requirements: Mapping[str, object] | None = None, *, select: Select | None = None
    ) -> Choice:
        """Choose a plugin by name, or the best that fits for ``auto``.

        A name never falls back. ``auto`` keeps what meets the requirements (framework and capabilities; see
        :mod:`lwm_core.registry.requirements`), then what is usable here (``needs``, probe), then takes the highest
        priority, then the first by name and distribution.

        Raises:
            UnsupportedError: the named plugin does not meet a requirement.
            PluginError: it cannot be used, or for ``auto`` nothing can; the message tells each reason.
        """
        wanted = requirements or {}
        if name == AUTO:
            return self._choose_auto(kind, wanted, select)
        entry = self._entry(kind, name)
        spec = self._spec(entry)
        reason = unmet(spec, wanted)
        if reason:
            raise UnsupportedError(f"{who(entry.candidate)} does not fit: {reason}; name another {kind} or '{AUTO}'")
        self._check_here(entry, spec)
        if not _selected(kind, [entry], select):
            raise PluginError(f"{who(entry.candidate)} was vetoed by a hooks plugin (lwm_select)")
        return Choice(entry.candidate, spec, [])

    def _choose_auto(self, kind: str, wanted: Mapping[str, object], select: Select | None) -> Choice:
        check_kind(kind)
        entries = [self._judged(entry) for entry in self._entries if entry.candidate.kind == kind]
        reasons: dict[int, str] = {}
        for entry in entries:
            reason = self._reason_against(entry, wanted)
            if reason:
                reasons[id(entry)] = reason
        fit = [entry for entry in entries if id(entry) not in reasons]
        fit.sort(key=lambda entry: (-self._spec(entry).priority, entry.candidate.name, entry.candidate.dist))
        ranked = _selected(kind, fit, select)
        if not ranked:
            reasons.update({id(entry): "vetoed by a hooks plugin (lwm_select)" for entry in fit})
            raise PluginError(nothing_fits(kind, [(e.candidate, reasons[id(e)]) for e in entries]))
        best = ranked[0]
        for entry in fit:
            if entry is not best:
                reasons[id(entry)] = why_after(self._spec(entry), self._spec(best), entry in ranked)
        names = [entry.candidate.name for entry in entries]
        rejected = [
            (e.candidate.name if names.count(e.candidate.name) == 1 else e.candidate.label, reasons[id(e)])
            for e in entries
            if e is not best
        ]
        return Choice(best.candidate, self._spec(best), rejected)

    def _reason_against(self, entry: _Entry, wanted: Mapping[str, object]) -> str:
        """Why ``auto`` cannot take this one; empty if it can. Asks the cheapest question first."""
        if not entry.offered:
            return f"{entry.candidate.state}: {entry.candidate.reason}"
        try:
            spec = self._spec(entry)
            reason = unmet(spec, wanted)
            if not reason:
                self._check_here(entry, spec)
        except PluginError:
            if strict():
                raise
            prefix = "broken: " if entry.candidate.state == "broken" else ""
            return prefix + entry.candidate.reason
        return reason

    # One plugin.

    def _entry(self, kind: str, name: str) -> _Entry:
        """The one entry that ``name`` or ``dist:name`` means, or the error that says why there is none."""
        check_kind(kind)
        dist, _, plain = name.rpartition(":")
        matching = [
            self._judged(entry)
            for entry in self._entries
            if entry.candidate.kind == kind
            and entry.candidate.name == plain
            and (not dist or entry.candidate.dist == normalise(dist))
        ]
        offered = [entry for entry in matching if entry.offered]
        if len(offered) == 1:
            return offered[0]
        if offered:
            raise PluginError(ambiguous(kind, plain, [entry.candidate for entry in offered]))
        if matching:
            raise PluginError(kept_out(matching[0].candidate))
        of_kind = [e.candidate for e in self._entries if e.candidate.kind == kind and e.offered]
        raise PluginError(unknown(kind, name, plain, of_kind))

    def _judged(self, entry: _Entry) -> _Entry:
        """Apply what needs no import: the allow and deny lists, then the distribution's own requirements."""
        if not entry.judged:
            entry.judged = True
            candidate = entry.candidate
            against = next((r for rule in self._rules if (r := rule.reason_against(candidate.dist))), "")
            if against and candidate.state != "shadowed":
                entry.mark("disabled", against)
            elif candidate.state == "available" and candidate.requires and candidate.dist != CORE_DIST:
                reason = compat.conflict(candidate.requires)
                if reason:
                    entry.mark("incompatible", reason)
        return entry

    def _spec(self, entry: _Entry) -> PluginSpec:
        if entry.spec is None:
            found = self._import(entry, entry.candidate.value)
            if not isinstance(found, PluginSpec):
                self._fail(entry, f"{entry.candidate.value} is {type(found).__name__}, expected a PluginSpec")
            if found.name != entry.candidate.name:
                self._fail(entry, f"its PluginSpec is named {found.name!r}, expected the entry point's name")
            entry.spec = found
        return entry.spec

    def _import(self, entry: _Entry, path: str) -> object:
        if entry.candidate.state == "broken":
            self._fail(entry, entry.candidate.reason, entry.candidate.traceback)
        try:
            return import_path(path)
        except PLUGIN_FAULTS as error:
            if strict():
                raise
            self._fail(entry, f"failed to import: {first_line(error)}", formatted(error), error)

    def _check_here(self, entry: _Entry, spec: PluginSpec) -> None:
        """Raise unless the plugin can be used on this machine; the probe runs once."""
        self._check_needs(entry, spec)
        if entry.candidate.state == "unusable":
            raise PluginError(unusable(entry.candidate))
        if spec.probe is None or entry.probed:
            return
        entry.probed = True
        traceback = ""
        try:
            reason = probe_reasons(spec.probe)
        except PLUGIN_FAULTS as error:
            if strict():
                raise
            reason, traceback = f"its probe failed: {first_line(error)}", formatted(error)
        if reason:
            entry.mark("unusable", reason, traceback)
            raise PluginError(unusable(entry.candidate), details=traceback)

    def _check_needs(self, entry: _Entry, spec: PluginSpec) -> None:
        reason = missing_needs(spec.needs)
        if reason:
            entry.mark("unusable", reason)
            raise PluginError(unusable(entry.candidate))

    def _fail(self, entry: _Entry, reason: str, traceback: str = "", cause: BaseException | None = None) -> NoReturn:
        entry.mark("broken", reason, traceback)
        candidate = entry.candidate
        raise PluginError(
            f"{who(candidate)} {'' if reason.startswith('failed') else 'is broken: '}{reason}"
            f" (lwm plugins show {candidate.name})",
            details=traceback,
        ) from cause


def _selected(kind: str, fit: list[_Entry], select: Select | None) -> list[_Entry]:
    """The entries that the hook lets through, in its order; all of them, as they are, where it has no opinion."""
    answer = select(kind, tuple(entry.candidate for entry in fit)) if select is not None and fit else None
    if answer is None:
        return fit
    by_candidate = {entry.candidate: entry for entry in fit}
    strangers = [c for c in answer if c not in by_candidate]
    if strangers:
        raise PluginError(f"lwm_select answered {strangers[0]!r}, expected some of the {kind} candidates it was given")
    return [by_candidate[candidate] for candidate in answer]
