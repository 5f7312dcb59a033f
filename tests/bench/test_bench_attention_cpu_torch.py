"""The benchmark ``attention-cpu-torch``: its arithmetic, its refusals, and that what is timed is attention.

Shapes: B batch, S sequence, H heads, D head dim.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lwm_core.attention import AttentionMask
from lwm_core.errors import LwmError, UsageError
from lwm_core.reference import attention_backward, attention_forward

HERE = Path(__file__).parent
SCRIPT = HERE / "attention_cpu_torch.py"
PEER_IS_THERE = importlib.util.find_spec("ring_attention_pytorch") is not None
needs_peer = pytest.mark.skipif(not PEER_IS_THERE, reason="ring-attention-pytorch is not installed")


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark's files import each other as scripts of one folder do."""
    monkeypatch.syspath_prepend(str(HERE))


def test_ratios_compare_the_same_round() -> None:
    """The median of per-round ratios, which is not the ratio of the medians here; and that of the least times."""
    from attention_cpu_torch import summarise

    times = [(1.0, 0.5, 2.0), (2.0, 1.8, 10.0), (4.0, 2.4, 4.0)]
    rounds = [{"forward": {"ours": a, "ceiling": b, "peer": c}} for a, b, c in times]
    found = summarise(rounds, {"forward": 8e9})["forward"]
    assert found["ratio_to_ceiling"] == {"median": 0.6, "min": 0.5, "max": 0.9, "of_least": 0.5}
    assert found["ratio_to_peer"] == {"median": 2.0, "min": 1.0, "max": 5.0, "of_least": 2.0}
    assert found["ours_gflops"] == {"median": 4.0, "min": 2.0, "max": 8.0}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--smoke", "--write"], "leave out --write or --smoke"),
        (["--out", "no-such-folder/result.json"], "no folder no-such-folder"),
        (["--rounds", "0"], "--rounds 0"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(
    options: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from attention_cpu_torch import main

    assert main(options) == UsageError.exit_code
    shown = capsys.readouterr()
    assert told in shown.err and shown.err.count("\n") == 1
    assert not shown.out


def test_figures_go_between_the_marks(tmp_path: Path) -> None:
    """What stands around them stays; a page without its marks is refused and left alone."""
    from bench_torch_page import BEGIN, END, markdown_table, write_figures

    page = tmp_path / "page.md"
    page.write_text(f"# before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    for figures in ("once", markdown_table(["a", "b"], [["x", "1"]])):
        write_figures(page, figures)
        assert page.read_text() == f"# before\n\n{BEGIN}\n\n{figures}\n\n{END}\n\nafter\n"
    assert figures == "| a | b |\n| --- | ---: |\n| x | 1 |"
    for text in (f"{BEGIN}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}{END}{BEGIN}{END}", ""):
        page.write_text(text)
        with pytest.raises(LwmError, match="once each, in this order"):
            write_figures(page, "new")
        assert page.read_text() == text


@pytest.mark.parametrize("name", ["attention-cpu-torch", "attention-gpu-torch"])
def test_the_pages_have_their_marks(name: str, tmp_path: Path) -> None:
    from bench_torch_page import write_figures

    page = HERE.parents[1] / "docs" / "benchmarks" / f"{name}.md"
    copy = tmp_path / page.name
    copy.write_text(page.read_text())
    write_figures(copy, "new figures")
    assert "new figures" in copy.read_text()


PEER_WAYS: list[Any] = [{"bucket_size": 16, "striped": striped} for striped in (False, True)]


@pytest.mark.parametrize(
    ("side", "world", "how"),
    [("ours", 2, None), ("ceiling", 1, None), *(pytest.param("peer", 2, way, marks=needs_peer) for way in PEER_WAYS)],
)
def test_what_is_timed_is_causal_attention(side: str, world: int, how: Any, tmp_path: Path) -> None:
    """Every side equals the float64 oracle, gradients included, put back into natural order; a wrong request fails."""
    pytest.importorskip("torch")
    pytest.importorskip("lwm_torch_ring")
    from attention_cpu_torch import Case, gathered, save_inputs
    from bench_torch_ranks import Ranks

    case = Case(seq_len=64, heads=2, head_dim=8)
    save_inputs(case, tmp_path)
    q, k, v, dout = (np.load(tmp_path / f"{name}.npy") for name in ("q", "k", "v", "dout"))
    request = {"folder": str(tmp_path), "seq_len": case.seq_len}
    with Ranks(side, sys.executable, HERE / f"attention_cpu_torch_{side}.py", request, world) as ranks:
        assert [told["threads"] for told in ranks.ask("about")] == [1] * world
        saved = ranks.ask("save", kind="forward+backward", name=side, how=how)
        assert ranks.seconds(kind="forward", how=how) > 0
        assert ranks.seconds(kind="forward", how=how, tokens=32) > 0
        with pytest.raises(LwmError, match="'nothing'"):
            ranks.ask("time", kind="nothing", how=how)
    mask = AttentionMask("causal")
    expected = (attention_forward(q, k, v, mask)[0], *attention_backward(q, k, v, mask, dout))
    for result, wanted in zip(("out", "dq", "dk", "dv"), expected, strict=True):
        got = gathered(saved, result, tmp_path)
        assert np.linalg.norm(got - wanted) < 1e-5 * np.linalg.norm(wanted), result


class Written:
    """Stands for ranks: writes the results it was made with."""

    def __init__(self, folder: Path, wrong: str = "", value: float = 1.0) -> None:
        self.folder, self.wrong, self.value = folder, wrong, value

    def ask(self, do: str, kind: str, name: str, how: Any) -> list[dict[str, Any]]:
        """The replies to ``save``."""
        np.save(self.folder / f"{name}-places.npy", np.arange(4))
        files = {}
        for result in ("out", "dq", "dk", "dv") if kind == "forward+backward" else ("out",):
            files[result] = f"{name}-{result}.npy"
            np.save(self.folder / files[result], np.full((1, 4, 2, 8), self.value if result == self.wrong else 1.0))
        return [{"files": files, "places": f"{name}-places.npy"}]


@pytest.mark.parametrize("side", ["ours", "peer"])
@pytest.mark.parametrize(("wrong", "value"), [("out", 1.001), ("dk", 1.001), ("dv", float("nan"))])
def test_what_computes_something_else_is_not_compared(tmp_path: Path, side: str, wrong: str, value: float) -> None:
    """Any one result that differs, or is no number, ends the run and is named; equal ones do not."""
    from attention_cpu_torch import compare

    best = {"forward": {}, "forward+backward": {}}
    sides: Any = {name: Written(tmp_path) for name in ("ours", "ceiling", "peer")}
    assert set(compare(sides, best, tmp_path).values()) == {0.0}
    sides[side] = Written(tmp_path, wrong, value)
    with pytest.raises(LwmError, match=rf"{side} forward\S* {wrong} is"):
        compare(sides, best, tmp_path)


@needs_peer
def test_the_smoke_case_gives_everything(tmp_path: Path) -> None:
    pytest.importorskip("lwm_torch_ring")
    command = [sys.executable, str(SCRIPT), "--smoke", "--out", str(tmp_path / "result.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "its figures mean nothing" in done.stdout
    result = json.loads((tmp_path / "result.json").read_text())
    (row,) = result["rounds"]
    assert {kind: set(times) for kind, times in row.items()} == {
        kind: {"ours", "ceiling", "peer"} for kind in ("forward", "forward+backward")
    }
    assert max(result["agreement"].values()) < 1e-5
