"""What people are told when a name does not lead to a plugin: one line each, always with what to do."""

from __future__ import annotations

from lwm_core.errors import PluginError
from lwm_core.registry.catalogue import known_names, near_miss
from lwm_core.registry.scan import Candidate
from lwm_core.registry.spec import KINDS, PluginSpec


def check_kind(kind: str) -> None:
    """Raise unless ``kind`` is one of :data:`KINDS`."""
    if kind not in KINDS:
        near = near_miss(kind, KINDS)
        hint = f"; did you mean {near!r}?" if near else ""
        raise PluginError(f"plugin kind {kind!r} is unknown{hint} (kinds: {', '.join(KINDS)})")


def who(candidate: Candidate) -> str:
    """A candidate as every message names it."""
    return f"{candidate.kind} {candidate.name!r} ({candidate.origin})"


def ambiguous(kind: str, name: str, offered: list[Candidate]) -> str:
    """A name that several distributions offer."""
    origins = " and ".join(c.origin for c in offered)
    return f"{kind} {name!r} is offered by {origins}; write {' or '.join(repr(c.label) for c in offered)}"


def kept_out(candidate: Candidate) -> str:
    """A plugin that is there but may not be used."""
    if candidate.state == "incompatible":
        return f"{who(candidate)} {candidate.reason}; upgrade one of them"
    return f"{who(candidate)} is {candidate.state}: {candidate.reason}"


def unusable(candidate: Candidate) -> str:
    """A plugin that cannot run on this machine."""
    return f"{who(candidate)} cannot be used here: {candidate.reason}"


def why_after(spec: PluginSpec, best: PluginSpec, ranked: bool) -> str:
    """Why ``auto`` took ``best`` rather than a plugin that fits as well."""
    if not ranked:
        return "vetoed by a hooks plugin (lwm_select)"
    if spec.priority < best.priority:
        return f"priority {spec.priority} is below {best.priority} of {best.name}"
    if spec.priority > best.priority:
        return f"a hooks plugin (lwm_select) prefers {best.name}"
    return f"equal priority, comes after {best.name} by name"


def nothing_fits(kind: str, rejected: list[tuple[Candidate, str]]) -> str:
    """``auto`` found nothing: each reason, or what to install."""
    if rejected:
        return f"no {kind} fits: " + "; ".join(f"{c.name} ({c.origin}): {reason}" for c, reason in rejected)
    dists = sorted(set(known_names(kind).values()))
    return f"no {kind} is installed" + (f": pip install {' or '.join(dists)}" if dists else "")


def unknown(kind: str, name: str, plain: str, offered: list[Candidate]) -> str:
    """No plugin goes by ``name`` (``plain`` without its distribution): what to install, or the near miss."""
    known = known_names(kind)
    installed = sorted({candidate.name for candidate in offered})
    if name in known:
        return f"{kind} {name!r} is not installed: pip install {known[name]}"
    if plain in installed:
        hint = f"; {plain!r} is offered by {' and '.join(c.dist for c in offered if c.name == plain)}"
    else:
        near = near_miss(plain, [*installed, *known])
        hint = f"; did you mean {near!r}?" if near else ""
        if near and near not in installed:
            hint += f" (pip install {known[near]})"
    return f"{kind} {name!r} is unknown{hint}; installed: {', '.join(installed) or 'none'} (lwm plugins list)"
