"""The table of ``nox -s aot``: it runs, its stages are there and build, and it refuses wrong use before it begins."""

from __future__ import annotations

import importlib.util
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("aot.py")


@pytest.fixture(scope="module")
def scope() -> dict[str, Any]:
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        return runpy.run_path(str(SCRIPT))
    finally:
        sys.path.remove(str(SCRIPT.parent))


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True)


def test_every_row_names_a_stage_that_builds(scope: dict[str, Any]) -> None:
    pytest.importorskip("lwm_jax_ring")
    from lwm_core.config import load_config
    from lwm_core.pipeline import build
    from lwm_core.registry import Registry

    rows = (*scope["ROWS"], *scope["SMOKE"])
    for source in {row.source for row in rows}:
        stages = {stage.name for stage in build(load_config(source), Registry.from_environment()).stages}
        assert {row.stage for row in rows if row.source == source} <= stages, source


def test_flatness_leaves_shares_out(scope: dict[str, Any]) -> None:
    rows = [
        {"group": group, "temporary_bytes": temporary, "parameter_bytes": parameters}
        for group, temporary, parameters in
        (("text", 9, 1), ("flat", 106, 8), ("flat", 98, 4), ("flat", 124, 2))
    ]  # fmt: skip
    assert scope["flatness"](rows) == [0.9, 0.9, 1.2]
    assert scope["flatness"](rows[:1]) == []


def test_the_committed_table_is_of_these_rows_and_everything_in_it_fits(scope: dict[str, Any]) -> None:
    """What the page says of the table holds for the table."""
    found = json.loads(scope["RESULT"].read_text())
    rows = found["rows"]
    assert [(row["group"], row["stage"], row["topology"]) for row in rows] == [
        (row.group, row.stage, row.topology) for row in scope["ROWS"]
    ]
    assert not [row["stage"] for row in rows if row["problem"] is not None]
    assert all(row["bytes"] < row["limit_bytes"] for row in rows)
    assert all(abs(share - 1) < 0.05 for share in scope["flatness"](rows))


@pytest.mark.parametrize(
    ("group", "stage", "mesh", "most"), [("text", "1M", "1,-1,16,4", 17.9e9), ("push", "4M", "1,1,16,16", 20.8e9)]
)
def test_the_rows_are_better_than_gathering_all_keys(
    scope: dict[str, Any], group: str, stage: str, mesh: str, most: float
) -> None:
    """Bytes a device on v4-512 of the same steps with all-gathered keys and values: 17.9 and 20.8 GB."""
    rows = [
        row for row in json.loads(scope["RESULT"].read_text())["rows"]
        if (row["group"], row["stage"], row["topology"], row["mesh"]) == (group, stage, "v4:8x8x4", mesh)
    ]  # fmt: skip
    assert rows and all(row["bytes"] < most for row in rows)


@pytest.mark.tpu_aot
@pytest.mark.tpu_pods
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_smoke_case_runs(tmp_path: Path) -> None:
    done = bench("--smoke", "--out", str(tmp_path / "result.json"))
    assert done.returncode == 0, done.stderr
    assert "its figures mean nothing" in done.stdout
    (row,) = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert row["stage"] == "8K" and row["sent"]["collective-permute"]["count"] > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--smoke", "--write"), "leave out --write or --smoke"),
        (("--out", "nowhere/result.json"), "there is no folder nowhere"),
    ],
)
def test_wrong_use_is_one_line(options: tuple[str, ...], words: str) -> None:
    done = bench(*options)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and words in done.stderr
