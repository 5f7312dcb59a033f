"""The benchmark ``strategies``: it runs, counts what it says it counts, and refuses wrong use before it begins."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("strategies.py")


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("lwm_jax_ring")
    return subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True)


def test_the_smoke_case_gives_a_row_for_everything(tmp_path: Path) -> None:
    done = bench("--smoke", "--out", str(tmp_path / "result.json"))
    assert done.returncode == 0, done.stderr
    assert "its figures mean nothing" in done.stdout
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert {(row["strategy"], row["documents"]) for row in rows} == {
        (strategy, kind) for strategy in ("ring", "allgather", "usp", "ulysses") for kind in ("one", "packed")
    }
    by_name = {row["strategy"]: row for row in rows if row["documents"] == "one"}
    # 512 tokens in blocks of 16: 32·33/2 = 528 blocks of a head over 8 ranks, 4 ranks of two devices, and 1.
    assert [by_name[name]["blocks_mean"] for name in ("ring", "usp", "ulysses")] == [66, 132, 528]
    assert all(row["blocks_most"] <= 1.05 * row["blocks_mean"] for row in by_name.values())
    # K and V, 64 tokens, 8 heads of 16 in float32: 7 transfers forward and 7 back, 8 of the gradients.
    assert by_name["ring"]["bytes_sent"] == (7 + 7 + 8) * 2 * 64 * 8 * 16 * 4


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
