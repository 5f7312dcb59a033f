"""A planted plugin: the distribution ``acme-numpy`` in a folder of its own, as pip would have installed it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lwm_core import registry
from lwm_core.testing import close_workers

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def acme_site(tmp_path_factory: pytest.TempPathFactory, planted: Callable[..., None]) -> Path:
    """A folder for ``sys.path`` that holds the distribution."""
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(HERE / "planted" / "acme_numpy", site / "acme_numpy", ignore=shutil.ignore_patterns("__pycache__"))
    names = ("acme-numpy", "acme-heavy", "acme-silent", "acme-hollow")
    points = {name: f"acme_numpy._lwm:{name.partition('-')[2]}" for name in names}
    planted(site, "acme-numpy", {"lwm.attention.v1": {**points, "acme-heavy": "acme_numpy.heavy:heavy"}})
    return site


@pytest.fixture
def acme(acme_site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """``acme-numpy`` installed in this process and, through its path, in the workers."""
    monkeypatch.syspath_prepend(os.fspath(acme_site))
    registry.refresh()
    yield "acme-numpy"
    close_workers()
    monkeypatch.undo()
    registry.refresh()
