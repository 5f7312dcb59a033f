"""The whole system with the JAX trainer and the data, tokenizer, schedule and evaluation plugins, as real processes."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lwm_jax_ring")

RECIPE = """
name = "extend"
seed = 5
model = { preset = "debug", hidden_size = 32, intermediate_size = 64, num_layers = 2 }
tokenizer = { name = "bytes" }
trainer = { name = "jax", host_devices = 4 }
attention = { name = "jax-ring", layout = "zigzag" }
evals = [{ name = "needle", samples = 2, samples_longest = 2, lengths = [512], max_new_tokens = 10 }]

[data]
name = "mix"
sources.text = { kind = "text", corpus = "kjv" }
sources.needle = { kind = "needle", haystack = "text" }
weights = { text = 1.0 }

[context]
name = "progressive"
from = 128
lengths = [256, 512]
theta = [20_000.0, 80_000.0]
tokens = [12_288, 12_288]
batch_tokens = 1024
lr = 1e-3
mesh = ["1,1,1,4", "1,2,1,2"]
mix = [{ text = 1.0 }, { text = 0.5, needle = 0.5 }]

[samples]
prompts = ["And God said"]
max_new_tokens = 8

[run]
checkpoint_every = 5
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "extend.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def everything(lwm: Any) -> Any:
    """The command with every installed plugin, the stand-ins left out."""
    lwm.env = {key: value for key, value in os.environ.items() if not key.startswith("LWM_")}
    return lwm


@pytest.mark.slow
def test_a_killed_run_of_the_jax_trainer_ends_bit_for_bit(
    everything: Any, recipe: Path, tmp_path: Path, exact_rows: Callable[[Path], list[dict[str, Any]]]
) -> None:
    """Two stages on two meshes, killed −9 three times at random steps: the same losses and the same parameters."""
    whole = everything("run", str(recipe), "--out", "whole", "--json")
    assert whole.returncode == 0, whole.stderr
    assert json.loads(whole.stdout)["steps"] == 24
    chance = random.Random(11)
    out = tmp_path / "killed"
    kills = 0
    while True:
        words = ("resume", str(out)) if (out / "run.json").exists() else ("run", str(recipe), "--out", str(out))
        process = everything.start(*words)
        metrics = out / "metrics.jsonl"
        aim = (metrics.read_bytes().count(b"\n") if metrics.exists() else 0) + chance.randrange(3, 9)
        while kills < 3 and process.poll() is None:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= aim:
                process.kill()
                kills += 1
                break
            time.sleep(0.002)
        _, errors = process.communicate(timeout=300)
        if process.returncode != -9:
            assert process.returncode == 0, errors
            break
    assert kills == 3
    assert exact_rows(out) == exact_rows(tmp_path / "whole")
    for name in ("model/model.safetensors", "evals/needle.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    needles = json.loads((out / "evals" / "needle.json").read_text())
    assert {row["stage"] for row in needles["rows"]} == {"256", "512"}
    assert (out / "report.html").stat().st_size > 10_000
    text = everything("generate", str(out), "text", "--prompt", "And God", "--max-new-tokens", "4", "--json")
    assert json.loads(text.stdout)["tokens"] >= 1, text.stderr


WRONG = {
    "-s attention.layuot=zigzag": "did you mean layout?",
    "-s attention.layout=spiral": "attention.layout",
    "-s trainer.host_devices=many": "trainer.host_devices",
    "-s trainer.name=jacks": "jacks",
    '-s context.mesh="1,1,3,1"': "needs 3 devices, but 4 are here",
    "-s context.lengths=[250,512]": "250",
    "-s data.sources.text.corpus=kjw": "error: -s data.sources.text.corpus=kjw: expected 'kjv', got 'kjw'",
    '-s data.sources.text={kind="text",path="nowhere.txt"}': "nowhere.txt",
}


@pytest.mark.parametrize("override", WRONG)
def test_wrong_use_is_one_clear_line(override: str, everything: Any, recipe: Path, tmp_path: Path) -> None:
    """Refused before anything is written, with the word that is wrong, without a traceback."""
    result = everything("run", str(recipe), "--out", "out", *override.split(" ", 1))
    assert result.returncode in (1, 2), result.stderr
    assert WRONG[override] in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
