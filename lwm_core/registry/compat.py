"""Does a plugin fit what is installed? Read from its distribution's Requires-Dist, before any of its code runs.

``packaging`` evaluates versions and markers (PEP 440, PEP 508): the standard library has neither, and a parser of
our own would disagree with pip sooner or later.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache


def conflict(requires: Iterable[str]) -> str:
    """The first requirement that an installed distribution does not satisfy, in words; empty if there is none.

    A requirement that is not installed at all is no conflict: ``needs`` and the import itself tell that better.
    Requirements of extras are not asked for.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    for line in requires:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            return f"its requirement {line!r} cannot be read"
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _installed_version(requirement.name)
        if version is not None and not requirement.specifier.contains(version, prereleases=True):
            return f"needs {requirement.name}{requirement.specifier}; installed: {version}"
    return ""


@cache
def _installed_version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def forget() -> None:
    """Forget the versions that were looked up."""
    _installed_version.cache_clear()
