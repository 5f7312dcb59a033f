"""The three places where a plugin's code runs: an import by path, the check of ``needs``, the probe."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec

#: What a plugin's import may raise and must not take the host down with. ``sys.exit`` on import counts; Ctrl-C not.
PLUGIN_FAULTS = (Exception, SystemExit)


def strict() -> bool:
    """Whether ``LWM_PLUGINS_STRICT=1`` asks for a plugin's own exception instead of a one-line account of it."""
    return os.environ.get("LWM_PLUGINS_STRICT") == "1"


def first_line(error: BaseException) -> str:
    """``Type: first line of the message``."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def formatted(error: BaseException) -> str:
    """The traceback as text."""
    import traceback

    return "".join(traceback.format_exception(error))


def import_path(path: str) -> object:
    """Import ``module:attribute`` and return the attribute."""
    module, _, attribute = path.partition(":")
    found: object = import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def is_installed(module: str) -> bool:
    """Whether a top-level module can be found. Never asked of ``a.b``: finding that would execute ``a``."""
    if "." in module:
        raise ValueError(f"module {module!r}: expected a top-level name")
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # ValueError: in sys.modules without a spec, as ``__main__`` may be
        return module in sys.modules


def missing_needs(needs: Iterable[str]) -> str:
    """The needed modules that are not installed, in words; empty if all are."""
    missing = [module for module in needs if not is_installed(module)]
    return f"needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed" if missing else ""


def probe_reasons(path: str) -> str:
    """Run a plugin's probe and return its reasons in words; empty if the plugin can be used here."""
    probe = import_path(path)
    if not callable(probe):
        raise TypeError(f"probe {path} is {type(probe).__name__}, expected a function")
    answer = probe()
    if not answer:
        return ""
    reasons = [answer] if isinstance(answer, str) else answer
    if not isinstance(reasons, (list, tuple)) or not all(isinstance(reason, str) for reason in reasons):
        raise TypeError(f"probe {path} answered {answer!r}, expected reasons (texts) or nothing")
    return "; ".join(reasons)
