"""Which plugins are installed, read from the metadata of distributions in one cached pass. No plugin code runs.

``importlib.metadata`` caches nothing, and its import costs more than the scan; both are put off until first use.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

from lwm_core.registry.catalogue import near_miss
from lwm_core.registry.spec import KINDS, is_import_path, is_plugin_name

if TYPE_CHECKING:
    from importlib.metadata import Distribution, EntryPoint

#: available: nothing speaks against it yet. disabled: kept out by an allow or deny list. incompatible: its own
#: Requires-Dist is not met, or it is made for another version of the interface. broken: its entry point is malformed
#: or its import failed (traceback kept). unusable: it imports, but a needed module is missing or its probe gave
#: reasons. shadowed: another copy of the same distribution stands earlier on ``sys.path``.
State = Literal["available", "disabled", "incompatible", "broken", "unusable", "shadowed"]

CORE_DIST = "lwm-core"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One plugin as offered by one distribution.

    ``dist`` is the normalised distribution name (PEP 503), ``value`` the entry point's ``module:attribute``,
    ``requires`` the distribution's own Requires-Dist lines.
    """

    kind: str
    name: str
    dist: str
    version: str
    value: str
    state: State = "available"
    reason: str = ""
    traceback: str = ""
    requires: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """``dist:name``, which always resolves."""
        return f"{self.dist}:{self.name}"

    @property
    def origin(self) -> str:
        """``dist version``, as messages name it."""
        return f"{self.dist} {self.version}"


def normalise(dist: str) -> str:
    """A distribution's name as PEP 503 compares it: ``Lwm_Jax.Ring`` → ``lwm-jax-ring``."""
    return re.sub(r"[-_.]+", "-", dist).strip().lower()


@cache
def installed() -> tuple[Candidate, ...]:
    """Every plugin that any installed distribution offers, by kind, name and distribution; scanned once a process.

    The states here are ``available``, ``shadowed``, ``incompatible`` (an unknown group) and ``broken`` (a malformed
    entry point); the rest is for :class:`~lwm_core.registry.select.Registry` to tell.
    """
    from importlib.metadata import distributions

    found: dict[tuple[str, str, str], list[Candidate]] = {}
    for dist in distributions():
        text = dist.read_text("entry_points.txt")
        if not text or "[lwm." not in text:
            continue
        metadata = dist.metadata
        name = normalise(metadata["Name"] or "unknown")
        version = metadata["Version"] or "unknown"
        # A folder that is on sys.path twice, or reached by a link (lib64), gives the same distribution twice.
        key = (name, version, _location(dist))
        if key not in found:
            requires = tuple(metadata.get_all("Requires-Dist") or ())
            found[key] = _candidates(dist, name, version, requires, _first_copy(name, version, key[2]))
    return tuple(sorted((c for plugins in found.values() for c in plugins), key=sort_key))


def refresh() -> None:
    """Forget the scan: the next :func:`installed` sees distributions that were installed since."""
    from importlib import invalidate_caches

    from lwm_core.registry import compat

    invalidate_caches()
    installed.cache_clear()
    compat.forget()


def sort_key(candidate: Candidate) -> tuple[int, str, str, str]:
    """The stable order of listings: kind as :data:`KINDS` has it, name, distribution, version."""
    kinds = tuple(KINDS)
    rank = kinds.index(candidate.kind) if candidate.kind in KINDS else len(kinds)
    return rank, candidate.name, candidate.dist, candidate.version


def _location(dist: Distribution) -> str:
    return os.path.realpath(str(dist.locate_file("")))


def _first_copy(name: str, version: str, location: str) -> str:
    """Where and which the copy is that Python would import instead of this one; empty if it is this one."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        first = distribution(name)
    except PackageNotFoundError:
        return ""
    if (first.version, _location(first)) == (version, location):
        return ""
    return f"{name} {first.version} in {_location(first)} stands earlier on sys.path"


def _candidates(
    dist: Distribution, name: str, version: str, requires: tuple[str, ...], shadowed_by: str
) -> list[Candidate]:
    try:
        entries = list(dist.entry_points)
    except Exception as error:  # a malformed line makes the stdlib raise whatever it stumbles over
        reason = f"its entry_points.txt cannot be read: {type(error).__name__}: {error}"
        return [Candidate("?", "?", name, version, "", "broken", reason, requires=requires)]
    known = {(entry.group, entry.name) for entry in entries}
    values: dict[tuple[str, str], str] = {}
    out: list[Candidate] = []
    for entry in entries:
        if not entry.group.startswith("lwm."):
            continue
        kind = next((kind for kind, group in KINDS.items() if group == entry.group), entry.group)
        if kind not in KINDS and any((group, entry.name) in known for group in KINDS.values()):
            continue  # also offered for this version of the interface, as a plugin should that supports two
        first = values.setdefault((kind, entry.name), entry.value)
        if first == entry.value and (kind, entry.name) in {(c.kind, c.name) for c in out}:
            continue  # the same line twice, as some editable installs write it
        state, reason = _fault(entry, kind)
        if first != entry.value:
            state, reason = "shadowed", f"the same distribution offers it before as {first}"
        if shadowed_by:
            state, reason = "shadowed", shadowed_by
        out.append(Candidate(kind, entry.name, name, version, entry.value, state, reason, requires=requires))
    return out


def _fault(entry: EntryPoint, kind: str) -> tuple[State, str]:
    if kind not in KINDS:
        near = near_miss(entry.group, KINDS.values())
        hint = f"; did you mean {near!r}?" if near else ""
        return "incompatible", f"this lwm-core has no entry-point group {entry.group!r}{hint}"
    if not is_plugin_name(entry.name):
        return "broken", f"the entry point's name {entry.name!r} is not kebab-case"
    if not is_import_path(entry.value):
        return "broken", f"the entry point's value {entry.value!r} is not 'module:attribute'"
    return "available", ""
