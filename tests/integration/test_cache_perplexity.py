"""A cache in eight bits, measured: what it does to how well the shipped base model predicts the shipped text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

for module in ("lwm_tiny_base", "lwm_hf", "lwm_data"):
    pytest.importorskip(module)

SCRIPT = Path(__file__).parent / "cache_perplexity.py"


@pytest.mark.slow
@pytest.mark.parametrize("side", ["jax", "torch"])
def test_eight_bits_change_perplexity_by_less_than_half_a_percent(side: str) -> None:
    pytest.importorskip(f"lwm_{side}_ring")
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), side, "compute", "bfloat16", "int8"], env=env, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    exact = told["compute"]
    assert 1 < exact < 1000, "a model that has learnt nothing would not notice"
    assert 0 < abs(told["int8"] / exact - 1) < 0.005, told
    assert abs(told["bfloat16"] / exact - 1) < 0.005, told
