"""``lwm export``: what a run has trained, as a folder of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lwm_core.weights import read_model_folder

PLUGINS = "lwm-standin,lwm-hf"


def test_a_runs_model_is_exported(lwm: Any, small: Callable[..., Path]) -> None:
    pytest.importorskip("lwm_hf")
    assert lwm("run", str(small()), "--out", "r", LWM_PLUGINS=PLUGINS).returncode == 0
    done = lwm("export", "r", "out", LWM_PLUGINS=PLUGINS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("out: ") and "r/model" in done.stdout
    whole, out = (read_model_folder(lwm.cwd / name) for name in ("r/model", "out"))
    assert (out.model, out.rope, out.seq_len) == (whole.model, whole.rope, whole.seq_len)
    for name, value in whole.parameters.items():
        assert np.array_equal(out.parameters[name], value.astype(ml_dtypes.bfloat16)), name
    again = lwm("export", "r", "out", LWM_PLUGINS=PLUGINS)
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "nothing is written over" in again.stderr


def test_a_run_that_is_none_is_one_line(lwm: Any) -> None:
    pytest.importorskip("lwm_hf")
    done = lwm("export", "nowhere", "out", LWM_PLUGINS=PLUGINS)
    assert done.returncode in (1, 2) and done.stderr.count("\n") == 1 and not (lwm.cwd / "out").exists()
