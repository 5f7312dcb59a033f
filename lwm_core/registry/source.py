"""A look at a plugin's light module as text: would its import fail? Nothing of it is executed.

``lwm plugins list`` runs no plugin code and yet tells the plain cases of a broken plugin: a module that is not there,
a syntax error, an import of what is not installed, a bare ``raise``. What only running can show it does not claim.
"""

from __future__ import annotations

import ast
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec

from lwm_core.registry.loading import is_installed


def source_fault(path: str) -> str:
    """Why importing ``module:attribute`` would fail, as far as its text tells; empty if nothing speaks against it."""
    parts = path.partition(":")[0].split(".")
    try:
        spec = find_spec(parts[0])
    except (ImportError, ValueError):
        return ""
    if spec is None:
        return f"module {parts[0]!r} is not installed"
    fault = _module_fault(spec)
    for depth in range(2, len(parts) + 1):
        name = ".".join(parts[:depth])
        if fault or spec.submodule_search_locations is None:
            break
        try:
            below = PathFinder.find_spec(name, list(spec.submodule_search_locations))
        except (AttributeError, ImportError, KeyError):  # a namespace inside a package asks for the imported parent
            return ""
        if below is None:
            # A finder of its own (some editable installs) may know better than the folders do.
            own_finder = getattr(spec.loader, "get_source", None) is None and spec.loader is not None
            return "" if own_finder else f"module {name!r} does not exist"
        spec, fault = below, _module_fault(below)
    return fault


def _module_fault(spec: ModuleSpec) -> str:
    get_source = getattr(spec.loader, "get_source", None)
    if get_source is None:  # a namespace package, or a loader without text
        return ""
    try:
        text = get_source(spec.name)
        tree = ast.parse(text) if text is not None else ast.Module(body=[], type_ignores=[])
    except SyntaxError as error:
        return f"{spec.name} line {error.lineno}: SyntaxError: {error.msg}"
    except (ImportError, OSError, ValueError) as error:
        return f"{spec.name} cannot be read: {error}"
    # Only statements that every import executes: not those inside try, if or a function.
    for statement in tree.body:
        fault = _statement_fault(statement)
        if fault:
            return f"{spec.name} line {statement.lineno}: {fault}"
    return ""


def _statement_fault(statement: ast.stmt) -> str:
    if isinstance(statement, ast.Raise):
        return f"raises on import: {ast.unparse(statement)}".splitlines()[0]
    if isinstance(statement, ast.Import):
        modules = [alias.name for alias in statement.names]
    elif isinstance(statement, ast.ImportFrom) and statement.level == 0 and statement.module:
        modules = [statement.module]
    else:
        return ""
    missing = [top for top in (module.partition(".")[0] for module in modules) if not is_installed(top)]
    return f"imports {missing[0]!r}, which is not installed" if missing else ""
