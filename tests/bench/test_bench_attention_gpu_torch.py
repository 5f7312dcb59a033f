"""The benchmark ``attention-gpu-torch``: its ring is the whole attention, it runs small anywhere, it refuses wrong use.

Shapes: B batch, S sequence, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lwm_core.attention import AttentionMask
from lwm_core.layout import SequenceLayout
from lwm_core.reference import attention_backward, attention_forward

HERE = Path(__file__).parent
SCRIPT = HERE / "attention_gpu_torch.py"
PARTS = ("ring-64K", "ring-128K", "ring-256K", "packed")


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark's files import each other as scripts of one folder do; torch and the plugin are there."""
    pytest.importorskip("torch")
    pytest.importorskip("lwm_torch_ring")
    monkeypatch.syspath_prepend(str(HERE))


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(SCRIPT), *options], env=environment, capture_output=True, text=True)


def errors_of(row: dict[str, Any]) -> list[float]:
    """Of all sides and results."""
    found = row["errors"].values()
    return [error for one in found for error in (one.values() if isinstance(one, dict) else [one])]


def test_the_smoke_case_runs_every_part(tmp_path: Path) -> None:
    done = bench("--smoke", "--out", str(tmp_path / "result.json"))
    assert done.returncode == 0, done.stderr
    assert "its figures mean nothing" in done.stdout
    parts = json.loads((tmp_path / "result.json").read_text())["parts"]
    assert set(parts) == {*PARTS, "step", "million"}
    for name in PARTS:
        assert [row["kind"] for row in parts[name]["rows"]] == ["forward", "forward+backward"]
        assert parts[name]["notes"][0] == "kernel cpu-flash" and parts[name]["dtype"] == "bfloat16"
        assert all(1e-4 < max(errors_of(row)) < 2e-2 for row in parts[name]["rows"]), "of bfloat16"
    assert set(parts["packed"]["rows"][0]["seconds"]) == {
        "whole", "a call a document", "ring of 8, zigzag", "ring of 8, contiguous", "one rank"
    }  # fmt: skip


def test_a_part_by_itself_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    """By another kernel too; what another command has found stays in the file."""
    target = tmp_path / "result.json"
    target.write_text(json.dumps({"benchmark": "attention-gpu-torch", "parts": {"another": {"found": 1}}}))
    done = bench("--smoke", "--only", "ring-64K", "--kernel", "math", "--out", str(target))
    assert done.returncode == 0, done.stderr
    parts = json.loads(target.read_text())["parts"]
    assert set(parts) == {"another", "ring-64K"} and parts["another"] == {"found": 1}
    assert parts["ring-64K"]["notes"][0] == "kernel math"


@pytest.mark.parametrize("kernel", ["cpu-flash", "math"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("kind", "world"), [("zigzag", 4), ("striped", 3), ("contiguous", 1)])
def test_a_played_ring_is_attention(kernel: str, packed: bool, kind: Any, world: int) -> None:
    """It gives what the float64 oracle does, all gradients included, in natural order."""
    import torch
    from bench_torch_played import PlayedRing

    from lwm_torch_ring.attention.options import AttentionOptions
    from lwm_torch_ring.attention.strategies import make_kernel

    random, seq_len, mask = np.random.default_rng(0), 96, AttentionMask("causal")
    q, k, v, dout = (random.standard_normal((1, seq_len, heads, 8), dtype=np.float32) for heads in (4, 2, 2, 4))
    ids = np.repeat(np.arange(1, 5, dtype=np.int32), [40, 1, 30, 25])[None] if packed else None
    made = make_kernel(AttentionOptions(kernel=kernel, chunk=8), torch.device("cpu"), torch.float32, 8)
    ring = PlayedRing(SequenceLayout(kind, world), seq_len, mask, made, ids)
    assert sum(ring.prepare().values()) > 0
    dealt = [ring.deal(torch.from_numpy(x)) for x in (q, k, v, dout)]
    expected = (attention_forward(q, k, v, mask, ids)[0], *attention_backward(q, k, v, mask, dout, ids))
    for got in (ring.run(*dealt), ring.run(*dealt[:3])):
        assert len(got) in (1, 4)
        for a, b in zip(map(ring.natural, got), expected, strict=False):
            assert np.linalg.norm(a.numpy() - b) < 1e-5 * np.linalg.norm(b)


def test_document_lengths_fill_the_row() -> None:
    """Log-normal by their mean, and the same every time."""
    from attention_gpu_torch_packed import MEAN, document_lengths

    lengths = document_lengths(4_000_000, MEAN)
    assert sum(lengths) == 4_000_000 and min(lengths) >= 1
    assert abs(np.mean(lengths) / MEAN - 1) < 0.1
    assert abs(np.std(np.log(lengths[:-1])) - 1) < 0.1
    assert lengths == document_lengths(4_000_000, MEAN)


def test_results_that_differ_end_the_run() -> None:
    """By too much, or by being no number."""
    import torch
    from bench_torch_gpu import Setting, check
    from rich.console import Console

    from lwm_core.errors import LwmError

    setting = Setting(torch.device("cpu"), True, "auto", 1, Console(), torch.float32)
    ones = torch.ones(8)
    assert check("x", (ones, ones), (ones, ones), setting) == {"out": 0.0, "dq": 0.0}
    for wrong in (1.001 * ones, torch.full((8,), torch.nan)):
        with pytest.raises(LwmError, match="x: dq is"):
            check("x", (ones, wrong), (ones, ones), setting)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "needs an NVIDIA GPU"),
        (("--smoke", "--write"), "leave out --write or --smoke"),
        (("--smoke", "--rounds", "0"), "--rounds 0"),
        (("--smoke", "--kernel", "cuda-flash"), "it needs an NVIDIA GPU"),
        (("--out", "nowhere/x.json"), "there is no folder nowhere"),
    ],
)
def test_wrong_use_is_one_line(options: tuple[str, ...], words: str) -> None:
    done = bench(*options)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and words in done.stderr


def test_the_step_and_the_million_are_told(tmp_path: Path) -> None:
    done = bench("--smoke", "--only", "step", "--only", "million", "--out", str(tmp_path / "result.json"))
    assert done.returncode == 0, done.stderr
    parts = json.loads((tmp_path / "result.json").read_text())["parts"]
    assert 0 < parts["step"]["mfu"] < 1 and parts["step"]["losses"][0] == pytest.approx(np.log(256), rel=0.1)
    assert len(parts["million"]["seconds"]) == parts["million"]["layers"] == 3
    assert parts["million"]["loss"] == pytest.approx(np.log(256), rel=0.1)


def test_a_pass_cut_into_commands_is_the_whole_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that has time for one layer puts the stream away; the next goes on, to the very same loss.

    What was put away stays until the result is written: a command that ended before that leaves the last nothing but
    the loss to do.
    """
    import attention_gpu_torch_million as million
    import torch
    from bench_torch_gpu import Setting
    from rich.console import Console

    from lwm_core.errors import LwmError

    setting = Setting(torch.device("cpu"), True, "auto", 1, Console(quiet=True), torch.float32)
    monkeypatch.setattr(million, "FOLDER", tmp_path / "whole")
    whole = million.measure(setting)
    again = million.measure(setting)
    assert again["loss"] == whole["loss"] and again["seconds"] == whole["seconds"]
    million.kept(setting, again)
    assert not list((tmp_path / "whole-smoke").glob("*"))
    monkeypatch.setattr(million, "FOLDER", tmp_path / "cut")
    monkeypatch.setattr(million, "SECONDS", 0.0)
    parts = [million.measure(setting) for _ in range(3)]
    assert [len(part["seconds"]) for part in parts] == [1, 2, 3]
    assert ["loss" in part for part in parts] == [False, False, True]
    assert "1 of 3 layers; run it again" in million.figures(parts[0])[0].value
    assert parts[2]["loss"] == whole["loss"]
    million.kept(setting, parts[1])
    assert len(list((tmp_path / "cut-smoke").glob("*"))) == 2, "a pass that is not through is kept"
    short = replace(setting, dtype=torch.bfloat16)
    with pytest.raises(LwmError, match="holds another pass"):
        million.measure(short)
    slow = {**parts[2], "seconds": [1.0] * 3, "loss_seconds": 7.0}
    assert "**10 s**" in million.figures(slow)[0].value, "the loss's time counts, as its operations do"
