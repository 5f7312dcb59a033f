"""A planted plugin: the distribution ``acme-numpy`` in a folder of its own, as pip would have installed it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from lwm_core import registry
from lwm_core.testing import close_workers

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def planted_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for ``sys.path`` that holds the distribution."""
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(HERE / "planted" / "acme_numpy", site / "acme_numpy", ignore=shutil.ignore_patterns("__pycache__"))
    info = site / "acme_numpy-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-numpy\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[lwm.attention.v1]\nacme-numpy = acme_numpy._lwm:attention\n")
    return site


@pytest.fixture
def planted(planted_site: Path, monkeypatch: pytest.MonkeyPatch):
    """``acme-numpy`` installed in this process and, through its path, in the workers."""
    monkeypatch.syspath_prepend(os.fspath(planted_site))
    registry.refresh()
    yield "acme-numpy"
    close_workers()
    monkeypatch.undo()
    registry.refresh()
