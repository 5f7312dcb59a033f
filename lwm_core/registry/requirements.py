"""Does a plugin state what a run requires of it? Pure functions over a ``PluginSpec``; nothing is imported.

A requirement ``key = wanted`` is held against the capability of that name:

- words: ``masks = "causal"`` or ``masks = ("causal", "full")`` must all be among those stated; not stated is not met;
- a bool: ``gqa = True`` must be stated as true; ``False`` asks for nothing;
- a number: ``head_dim = 128`` must not exceed the limit ``max_head_dim`` (or ``head_dim``); no stated limit is none;
- ``framework``: a plugin without a framework works with any. ``None`` asks for nothing, for every key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lwm_core.registry.spec import PluginSpec


def unmet(spec: PluginSpec, requirements: Mapping[str, object]) -> str:
    """The requirements that ``spec`` does not meet, in words and in a stable order; empty if it meets them all."""
    reasons = (_unmet(spec, key, requirements[key]) for key in sorted(requirements))
    return "; ".join(reason for reason in reasons if reason)


def _unmet(spec: PluginSpec, key: str, wanted: object) -> str:
    if wanted is None or wanted is False:
        return ""
    if isinstance(wanted, bool):
        return "" if spec.capability(key) is True else f"has no {key}"
    if isinstance(wanted, (int, float)):
        return _over_limit(spec, key, wanted)
    if isinstance(wanted, str):
        return _missing_words(spec, key, (wanted,))
    if isinstance(wanted, Iterable):
        return _missing_words(spec, key, tuple(str(word) for word in wanted))
    raise TypeError(f"requirement {key}: got {wanted!r}, expected words, a number or a bool")


def _over_limit(spec: PluginSpec, key: str, wanted: float) -> str:
    name = key if key.startswith("max_") else f"max_{key}"
    limit = spec.capability(name)
    limit = spec.capability(key) if limit is None else limit
    if limit is None:
        return ""
    if isinstance(limit, (bool, tuple)):
        return f"states {key} as {limit!r}, not as a number"
    return "" if wanted <= limit else f"{key} {wanted} is over its limit {limit}"


def _missing_words(spec: PluginSpec, key: str, wanted: tuple[str, ...]) -> str:
    stated = spec.capability(key)
    if key == "framework":
        if spec.framework is None or set(wanted) <= {spec.framework, ""}:
            return ""
        return f"is for {spec.framework}, not {' and '.join(wanted)}"
    if not isinstance(stated, tuple):
        return f"states no {key}"
    missing = [word for word in wanted if word not in stated]
    return f"has no {key} {', '.join(missing)} (it has {', '.join(stated) or 'none'})" if missing else ""
