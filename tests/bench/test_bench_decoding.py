"""The benchmark ``decoding``: its arithmetic, its refusals, and that all sides write the same."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from lwm_core.errors import LwmError, UsageError

HERE = Path(__file__).parent
SCRIPT = HERE / "decoding.py"


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark's files import each other as scripts of one folder do."""
    monkeypatch.syspath_prepend(str(HERE))


def test_rates_leave_out_the_prompt_and_ratios_compare_the_same_round() -> None:
    from decoding import rate, summarise

    assert rate({"seconds": [7.0, 7.5, 8.0, 9.0]}) == 1.5
    rounds = [{"jax": a, "torch": 1.0, "transformers": c} for a, c in ((4.0, 2.0), (8.0, 1.0), (9.0, 9.0))]
    found = summarise(rounds)
    assert found["ratio_to_transformers"]["jax"] == {"median": 2.0, "min": 1.0, "max": 8.0}
    assert found["tokens_per_second"]["transformers"] == {"median": 2.0, "min": 1.0, "max": 9.0}


def test_other_tokens_end_it() -> None:
    from decoding import agreed

    same = {side: {"tokens": [1, 2, 3]} for side in ("jax", "torch", "transformers")}
    assert agreed(same) == [1, 2, 3]
    with pytest.raises(LwmError, match="torch wrote another token than jax, the 1th"):
        agreed({**same, "torch": {"tokens": [1, 5, 3]}})


@pytest.mark.parametrize("side", ["jax", "torch"])
def test_the_figures_that_are_kept_are_half_as_fast_again(side: str) -> None:
    """The median over rounds of the ratio within one, in 21 of them."""
    from decoding import RESULT

    rounds = json.loads(RESULT.read_text())["rounds"]
    assert len(rounds) == 21
    assert statistics.median(one[side] / one["transformers"] for one in rounds) >= 1.5


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--smoke", "--write"], "leave out --write or --smoke"),
        (["--out", "no-such-folder/result.json"], "no folder no-such-folder"),
        (["--rounds", "0"], "--rounds 0"),
        (["--cores", "0"], "--cores 0"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(
    options: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from decoding import main

    assert main(options) == UsageError.exit_code
    shown = capsys.readouterr()
    assert told in shown.err and shown.err.count("\n") == 1 and not shown.out


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    """All three on the real folder; they write the same tokens, or it would have ended."""
    for plugin in ("lwm_jax_ring", "lwm_torch_ring", "transformers"):
        pytest.importorskip(plugin)
    out = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--smoke", "--out", str(out)], capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["smoke"] and all(found["rounds"][0][side] > 0 for side in ("jax", "torch", "transformers"))
    assert "its figures mean nothing" in done.stdout
