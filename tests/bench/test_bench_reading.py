"""The benchmark ``reading``, and the memory that it measures, at a length for every day."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lwm_core.errors import UsageError

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark's files import each other as scripts of one folder do."""
    monkeypatch.syspath_prepend(str(HERE))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["prefill", "score"])
@pytest.mark.parametrize("side", ["jax", "torch"])
def test_a_long_text_takes_the_memory_of_a_layer(side: str, task: str) -> None:
    """16K tokens: far below what a square of the length would take (4 heads: 4 GB)."""
    from reading import run

    pytest.importorskip(f"lwm_{side}_ring")
    found = run(side, task, 16_384)
    assert found["most"] - found["before"] < 600e6, found


@pytest.mark.long
@pytest.mark.parametrize(("task", "most"), [("prefill", 4e9), ("score", 2e9)])
@pytest.mark.parametrize("side", ["jax", "torch"])
def test_a_very_long_text_too(side: str, task: str, most: float) -> None:
    """128K tokens, of which a square would take 275 GB; the whole process, Python and framework included."""
    from reading import run

    pytest.importorskip(f"lwm_{side}_ring")
    found = run(side, task, 131_072)
    assert found["most"] < most, found


@pytest.mark.parametrize("side", ["jax", "torch"])
def test_the_figures_that_are_kept_are_flat(side: str) -> None:
    """Under 4 GB to read 128K tokens and 2 GB to score them; four times the tokens never take four times the growth."""
    from reading import RESULT

    rows = [row for row in json.loads(RESULT.read_text())["rows"] if row["side"] == side]
    for task, most in (("prefill", 4e9), ("score", 2e9)):
        grown = {row["tokens"]: row["most"] - row["before"] for row in rows if row["task"] == task}
        assert 131_072 in grown and max(row["most"] for row in rows if row["task"] == task) < most
        assert grown[131_072] < 4 * grown[32_768]


@pytest.mark.parametrize("options", [["--smoke", "--write"], ["--lengths", "many"], ["--lengths", "1"]])
def test_wrong_options_are_refused_before_anything_runs(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from reading import main

    assert main(options) == UsageError.exit_code
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and not shown.out


def test_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for plugin in ("lwm_jax_ring", "lwm_torch_ring"):
        pytest.importorskip(plugin)
    from reading import main

    out = tmp_path / "result.json"
    assert main(["--smoke", "--out", str(out)]) == 0
    assert [row["tokens"] for row in json.loads(out.read_text())["rows"]] == [1024] * 4
    assert "its figures mean nothing" in capsys.readouterr().out
