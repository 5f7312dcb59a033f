"""The benchmark ``planning``: its file is one that ``lwm plan`` reads, its rates are counted by hand, and it runs."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from lwm_core.errors import UsageError

HERE = Path(__file__).parent
FOUND = {"square": [8e10, 9e10, 1e11], "model": [6e10], "attention": [3e10], "memory": [5e9]}


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark's files import each other as scripts of one folder do."""
    for plugin in ("lwm_jax_ring", "lwm_plan"):
        pytest.importorskip(plugin)
    monkeypatch.syspath_prepend(str(HERE))


def test_the_figures_that_are_kept_are_within_30_percent() -> None:
    """Of four lengths, each ratio worked out again from the times that were measured."""
    from planning import RESULT

    rows = json.loads(RESULT.read_text())["rows"]
    assert len(rows) == 4
    for row in rows:
        assert row["ratio"] == pytest.approx(row["planned"] / statistics.median(row["measured"]))
        assert 0.7 < row["ratio"] < 1.3


def test_the_plan_takes_the_measured_rates() -> None:
    """Twice as fast a machine halves the step, and each of the three rates alone moves its own part."""
    from planning import Case, machine_file, planned

    file, case = machine_file(FOUND), Case(("512", "1024"))
    assert (file["peak_flops"], file["matrix_share"], file["attention_share"]) == (9e10, 6e10 / 9e10, 3e10 / 9e10)
    once = planned(file, case)
    twice = planned({**file, "peak_flops": 2 * 9e10, "memory_bandwidth": 1e10}, case)
    for name, one in once.items():
        assert twice[name]["step_seconds"] == pytest.approx(one["step_seconds"] / 2)
        assert not [warning for warning in one["warnings"] if "bfloat16" in warning]  # the rates are float32's own
    slow = planned({**file, "attention_share": file["attention_share"] / 2}, case)
    more = {name: slow[name]["step_seconds"] - once[name]["step_seconds"] for name in once}
    pairs = {length: length * (length + 1) / 2 * (4096 // length) for length in (512, 1024)}
    for name, seconds in more.items():  # seven products of 4 heads of 64 in 4 layers
        assert seconds == pytest.approx(7 * 2 * pairs[int(name)] * 4 * 64 * 4 / 3e10)


def test_a_peak_below_another_rate_is_raised_to_it() -> None:
    from planning import machine_file

    file = machine_file({**FOUND, "model": [1.2e11]})
    assert file["peak_flops"] == 1.2e11 and file["matrix_share"] == 1.0


@pytest.mark.parametrize("options", [["--smoke", "--write"], ["--rounds", "0"], ["--out", "nowhere/result.json"]])
def test_wrong_options_are_refused_before_anything_runs(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from planning import main

    assert main(options) == UsageError.exit_code
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and not shown.out


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, str(HERE / "planning.py"), "--smoke", "--out", str(out)], capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert [row["stage"] for row in found["rows"]] == ["512"]
    assert all(row["ratio"] > 0 and row["planned"] > 0 for row in found["rows"])
    assert "its figures mean nothing" in done.stdout
