"""What the packages export: every name of an ``__all__`` is there, listed once, and exported by one package only."""

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


ROOTS = [(ROOT, ROOT / "lwm_core"), *((src, src) for kind in ("plugins", "contrib") for src in ROOT.glob(f"{kind}/*/src"))]
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


@pytest.mark.parametrize("top", DISTRIBUTIONS)
def test_a_name_is_exported_once(top: str) -> None:
    """Neither twice by one package, nor by two packages of one distribution: each thing has one place."""
    names = Counter(
        name for module in EXPORTING if module.partition(".")[0] == top for name in import_module(module).__all__
    )
    assert [name for name, count in names.items() if count > 1] == []
