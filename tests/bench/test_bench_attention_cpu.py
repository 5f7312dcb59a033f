"""The benchmark's own arithmetic and refusals; how fast anything is, no test says.

Shapes: B batch, S sequence, H heads, D head dim.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lwm_core.attention import AttentionMask
from lwm_core.errors import LwmError, UsageError
from lwm_core.reference import attention_backward, attention_forward

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark's files import each other as scripts of one folder do."""
    monkeypatch.syspath_prepend(str(HERE))


def test_ratios_compare_the_same_round() -> None:
    """The median of per-round ratios, which is not the ratio of the medians here, and rates from hand-made seconds."""
    from bench_result import summarise

    pairs = [(1.0, 2.0), (2.0, 10.0), (4.0, 4.0)]
    rounds = [{"forward": {"ours": a, "peer": b, "peer_default": 3 * b}, "matmul": 0.5} for a, b in pairs]
    summary = summarise(rounds, {"forward": 8e9}, 2e9)
    assert summary["forward"]["ratio_to_peer"] == {"median": 2.0, "min": 1.0, "max": 5.0}
    assert summary["forward"]["ratio_to_peer_default"] == {"median": 6.0, "min": 3.0, "max": 15.0}
    assert summary["forward"]["ours_gflops"] == {"median": 4.0, "min": 2.0, "max": 8.0}
    assert summary["forward"]["peer_gflops"] == {"median": 2.0, "min": 0.8, "max": 4.0}
    assert summary["matmul_gflops"]["median"] == 4.0
    assert summary["forward"]["share_of_matmul"] == {"median": 1.0, "min": 0.5, "max": 2.0}


def test_flops_are_causal() -> None:
    """Half of 4·B·H·S²·D forward, 3.5 times that with backward."""
    from attention_cpu import Case

    flops = Case(seq_len=8192, heads=8, head_dim=64).flops()
    assert flops["forward"] == 4 * 8 * 8192 * 8192 * 64 / 2
    assert flops["forward+backward"] == 3.5 * flops["forward"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--smoke", "--write"], "--smoke measures nothing"),
        (["--out", "no-such-folder/result.json"], "no folder no-such-folder"),
        (["--rounds", "0"], "--rounds 0"),
        (["--peer-chunks", "256"], "'256'"),
        (["--peer-chunks", "256x512,256x300"], "'256x300'"),
        (["--peer-chunks", "256x-256"], "'256x-256'"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(
    options: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, exit 2; the interpreter named for the peer is never started."""
    from attention_cpu import main

    assert main(["--peer-python", "no-such-python", *options]) == UsageError.exit_code
    shown = capsys.readouterr()
    assert told in shown.err
    assert shown.err.count("\n") == 1
    assert not shown.out


def test_a_worker_that_ends_is_told_with_its_last_words(tmp_path: Path) -> None:
    """As where the peer's package is not there."""
    from bench_process import Worker

    script = tmp_path / "script.py"
    script.write_text("import sys\nprint('first', file=sys.stderr)\nsys.exit('no such package')\n")
    with Worker("peer", sys.executable, script, {"folder": str(tmp_path)}) as worker, pytest.raises(LwmError) as raised:
        worker.ask("about")
    assert str(raised.value) == "bench: the worker peer ended with code 1: no such package"
    assert "first" in raised.value.details


class Written:
    """Stands for a worker: writes the results it was made with."""

    def __init__(self, folder: Path, wrong: str = "", value: float = 1.0) -> None:
        self.folder, self.wrong, self.value = folder, wrong, value

    def ask(self, do: str, kind: str, name: str, chunks: tuple[int, int] | None = None) -> dict[str, Any]:
        """The reply to ``save``."""
        files = []
        for result in ("out", "dq", "dk", "dv") if kind == "forward+backward" else ("out",):
            files.append(f"{name}-{result}.npy")
            np.save(self.folder / files[-1], np.full((1, 4, 2, 8), self.value if result == self.wrong else 1.0))
        return {"files": files}


@pytest.mark.parametrize(
    ("wrong", "value"), [("out", 1.001), ("dq", 1.001), ("dk", 1.001), ("dv", 1.001), ("dv", float("nan"))]
)
def test_what_computes_something_else_is_not_compared(tmp_path: Path, wrong: str, value: float) -> None:
    """Any one result that differs, or is no number, ends the run and is named; equal ones do not."""
    from attention_cpu import compare

    best: Any = {"forward": (2, 2), "forward+backward": (2, 2)}
    same: Any = Written(tmp_path)
    other: Any = Written(tmp_path, wrong, value)
    assert set(compare(same, same, best, tmp_path).values()) == {0.0}
    with pytest.raises(LwmError, match=rf"differ in forward\S* {wrong} by"):
        compare(other, same, best, tmp_path)


def test_our_worker_computes_causal_attention_in_natural_order(tmp_path: Path) -> None:
    """What is timed equals the float64 oracle, gradients included, after zigzag and back; a wrong request fails."""
    from attention_cpu import Case, save_inputs
    from bench_process import Worker

    case = Case(seq_len=64, heads=2, head_dim=8)
    save_inputs(case, tmp_path)
    q, k, v, dout = (np.load(tmp_path / f"{name}.npy") for name in ("q", "k", "v", "dout"))
    request = {"folder": str(tmp_path), "seq_len": case.seq_len, "world": case.world}
    with Worker("ours", sys.executable, HERE / "attention_cpu_ours.py", request) as ours:
        assert ours.ask("about")["devices"] == case.world
        files = ours.ask("save", kind="forward+backward", name="ours")["files"]
        assert ours.ask("time", kind="forward")["seconds"] > 0
        with pytest.raises(LwmError, match="'nothing'"):
            ours.ask("time", kind="nothing")
    mask = AttentionMask("causal")
    expected = (attention_forward(q, k, v, mask)[0], *attention_backward(q, k, v, mask, dout))
    for file, wanted in zip(files, expected, strict=True):
        got = np.load(tmp_path / file)
        assert np.linalg.norm(got - wanted) < 1e-5 * np.linalg.norm(wanted), file
