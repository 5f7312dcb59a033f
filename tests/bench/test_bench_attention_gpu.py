"""The benchmark ``attention-gpu``: its ring is the whole attention, it runs small anywhere, it refuses wrong use."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("attention_gpu.py")


def bench(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("lwm_jax_ring")
    command = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def test_the_smoke_case_gives_a_row_for_everything(tmp_path: Path) -> None:
    done = bench("--smoke", "--out", str(tmp_path / "result.json"))
    assert done.returncode == 0, done.stderr
    assert "its figures mean nothing" in done.stdout
    found = json.loads((tmp_path / "result.json").read_text())
    assert {"jax", "jaxlib"} <= set(found["versions"])
    assert found["command"].startswith("nox -s bench -- attention-gpu --smoke --out ")
    rows = found["rows"]
    sides = ("library", "cudnn 1", "cudnn 4", "xla 1", "xla 4")
    assert [(row["pass"], row["side"]) for row in rows] == [
        (kind, side) for kind in ("forward", "forward+backward") for side in sides
    ]


def test_the_aim_is_held_against_the_quickest_whole_call(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lwm_jax_ring")
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    scope = runpy.run_path(str(SCRIPT))
    seconds = {"library": [1.0, 9.0, 1.0], "cudnn 1": [2.0, 2.0, 2.0], "cudnn 4": [2.0, 9.0, 1.25],
               "xla 1": [4.0, 4.0, 4.0], "xla 4": [4.0, 36.0, 4.0]}  # fmt: skip
    rows = [{"pass": "forward", "side": side, "seconds": times} for side, times in seconds.items()]
    assert scope["aims"](scope["SMOKE"], rows) == [
        {"pass": "forward", "kernel": "cudnn", "best": "library", "ratio": 0.8},
        {"pass": "forward", "kernel": "xla", "best": "library", "ratio": 0.25},
    ]
    faster = [{**row, "seconds": [0.5] * 3} if row["side"] == "cudnn 1" else row for row in rows]
    assert scope["aims"](scope["SMOKE"], faster)[0]["best"] == "cudnn 1"


def test_what_is_timed_is_attention() -> None:
    """All sides give the same gradients, in natural order."""
    code = f"""
import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})
import jax, numpy as np, jax.numpy as jnp
from attention_gpu import SMOKE, sides
from lwm_core.layout import SequenceLayout
shape = (1, SMOKE.seq_len, SMOKE.heads, SMOKE.head_dim)
keys = jax.random.split(jax.random.key(1), 4)
q, dout = (jax.random.normal(key, shape) for key in keys[:2])
k, v = (jax.random.normal(key, (*shape[:2], SMOKE.kv_heads, SMOKE.head_dim)) for key in keys[2:])
order = SequenceLayout("zigzag", SMOKE.ranks).permutation(SMOKE.seq_len)
expected = None
for name, step in sides(SMOKE, backward=True).items():
    dealt = [x[:, order] for x in (q, k, v, dout)] if name.endswith(" 4") else [q, k, v, dout]
    got = [np.asarray(x).swapaxes(0, 1) if x.ndim == 5 else np.asarray(x) for x in jax.jit(step)(*dealt)]
    got = [x.reshape(1, SMOKE.seq_len, *x.shape[-2:]) for x in got]
    if name.endswith(" 4"):
        got = [x[:, np.argsort(order)] for x in got]
    expected = expected or got
    for a, b in zip(expected, got, strict=True):
        error = np.linalg.norm(a - b) / np.linalg.norm(a)
        assert error < 1e-5, (name, error)
print("same")
"""
    pytest.importorskip("lwm_jax_ring")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "same\n", done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "needs an NVIDIA GPU, jax sees cpu"),
        (("--smoke", "--write"), "leave out --write or --smoke"),
        (("--out", "nowhere/x.json"), "there is no folder nowhere"),
    ],
)
def test_wrong_use_is_one_line(options: tuple[str, ...], words: str) -> None:
    done = bench(*options, JAX_PLATFORMS="cpu")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and words in done.stderr
