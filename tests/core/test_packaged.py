"""Paths from a folder, and inside a package that is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lwm_core.errors import DataError
from lwm_core.packaged import locate


def test_a_path_is_from_the_folder_and_a_package_is_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package is never imported: this one could not be."""
    (tmp_path / "some_clips").mkdir()
    (tmp_path / "some_clips" / "__init__.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    assert locate("some-clips:codes/a", Path("/x")) == tmp_path / "some_clips" / "codes" / "a"
    assert "some_clips" not in sys.modules
    assert locate("codes/a", tmp_path) == tmp_path / "codes" / "a"
    assert locate("/codes", tmp_path) == Path("/codes")
    assert locate("~/codes", tmp_path) == Path.home() / "codes"


@pytest.mark.parametrize("drive", [r"C:\clips\a.mp4", "C:/clips", r"some-clips:\x"])
def test_a_drive_is_no_distribution(drive: str, tmp_path: Path) -> None:
    assert locate(drive, tmp_path) == tmp_path / drive


def test_a_package_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"lwm-nothing:a\.mp4: lwm-nothing is not installed: pip install lwm-nothing"):
        locate("lwm-nothing:a.mp4", tmp_path)
    with pytest.raises(DataError, match="sys is not installed"):
        locate("sys:a.mp4", tmp_path)
