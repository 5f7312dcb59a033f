"""``lwm score`` of the shipped text by the shipped model, in one context and one process, without a cache."""

from __future__ import annotations

import json
import lzma
from importlib.resources import files
from math import exp
from typing import Any

import pytest

from lwm_core.testing.memory import can_measure, peak_until_exit

for needed in ("lwm_torch_ring", "lwm_data", "lwm_evals", "lwm_hf", "lwm_tiny_base"):
    pytest.importorskip(needed)

PLUGINS = "lwm-torch-ring,lwm-data,lwm-evals,lwm-hf,lwm-tiny-base"

RECIPE = """
name = "base"
init = "tiny-base"
tokenizer = { name = "hf" }
trainer = { name = "torch", device = "cpu" }
attention = { name = "torch-ring" }

[data]
name = "mix"
sources.text = { kind = "text", corpus = "kjv" }

[[stages]]
seq_len = 256
theta = 10e6
tokens = 1024
batch_tokens = 1024
lr = 1e-5
"""


@pytest.mark.skipif(not can_measure(), reason="memory is read from /proc")
@pytest.mark.parametrize("tokens", [2048, pytest.param(262_144, marks=pytest.mark.long)])
def test_perplexity_by_position_of_a_long_text(lwm: Any, tokens: int) -> None:
    """Scores of 262,144 tokens would take 275 GB a head at once. The base read texts of 256, and is worse beyond."""
    (lwm.cwd / "base.toml").write_text(RECIPE)
    assert lwm("run", "base.toml", "--out", "r", LWM_PLUGINS=PLUGINS).returncode == 0
    (lwm.cwd / "kjv.txt").write_bytes(lzma.decompress((files("lwm_data") / "corpora" / "kjv.txt.xz").read_bytes()))
    words = ("--max-tokens", str(tokens), "--plot", "p.svg", "--json")
    score = lwm.start("score", "r", "kjv.txt", *words, LWM_PLUGINS=PLUGINS)
    peak = peak_until_exit(score)
    stdout, stderr = score.communicate()
    assert score.returncode == 0, stderr
    told, drawn = json.loads(stdout), (lwm.cwd / "p.svg").read_text()
    print(f"{tokens} tokens: {told['seconds']:.0f} s, perplexity {told['perplexity']:.1f}")
    assert told["tokens"] == tokens and drawn.count("<svg") == 1
    assert told["perplexity"] == pytest.approx(exp(told["nats"]))
    bands = told["bands"]
    assert [1, *(band["stop"] for band in bands)] == [*(band["start"] for band in bands), tokens]
    assert min(band["nats"] for band in bands if band["stop"] <= 256) < bands[-1]["nats"]
    assert 0.1e9 < peak < 2.5e9
