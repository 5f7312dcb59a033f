"""What the packages export: every name of an ``__all__`` is there, listed once, and means one thing."""

from __future__ import annotations

import ast
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _has_all(source: Path) -> bool:
    """Whether a file assigns ``__all__``; read, not imported."""
    targets = (
        target
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    )
    return any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets)


def _module(source: Path, root: Path) -> str:
    """The dotted name of a file below ``root``."""
    parts = source.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = [src for kind in ("plugins", "contrib") for src in sorted(ROOT.glob(f"{kind}/*/src"))]
ROOTS = [(ROOT, ROOT / "lwm_core"), *((src, src) for src in SOURCES)]
EXPORTING = sorted(_module(path, root) for root, top in ROOTS for path in top.rglob("*.py") if _has_all(path))
DISTRIBUTIONS = sorted({name.partition(".")[0] for name in EXPORTING})


def test_the_cores_packages_are_found() -> None:
    """What the tests below run over is there."""
    assert {"lwm_core.registry", "lwm_core.run", "lwm_core.testing"} <= set(EXPORTING)


@pytest.mark.parametrize("module", EXPORTING)
def test_every_exported_name_is_there(module: str) -> None:
    """Each name can be got, lazily or not."""
    loaded = import_module(module)
    missing = [name for name in loaded.__all__ if not hasattr(loaded, name)]
    assert not missing


@pytest.mark.parametrize("module", EXPORTING)
def test_a_name_is_listed_once(module: str) -> None:
    """No list says a name twice."""
    names = Counter(import_module(module).__all__)
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("top", DISTRIBUTIONS)
def test_a_name_means_one_thing(top: str) -> None:
    """Two packages of a distribution export a name only where one passes on the other's very object."""
    meanings: dict[str, list[object]] = {}
    for module in (import_module(name) for name in EXPORTING if name.partition(".")[0] == top):
        for name in module.__all__:
            meanings.setdefault(name, []).append(getattr(module, name))
    assert [name for name, (first, *others) in meanings.items() if any(one is not first for one in others)] == []
