"""The metrics file and MFU."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_core.metrics import MetricsLog, cut_after, mfu, read_metrics
from lwm_core.model import preset, training_flops_per_token
from lwm_core.vocab import Vocabulary


def write(path: Path, steps: int) -> None:
    with MetricsLog(path) as log:
        for step in range(1, steps + 1):
            log.write({"step": step, "loss": 1 / step})


def test_every_line_is_there_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m.jsonl") as log:
        for step in (1, 2):
            log.write({"step": step, "loss": 0.1 + step})
            assert [row["loss"] for row in read_metrics(tmp_path / "m.jsonl")][-1] == 0.1 + step
        assert log.sync() == (tmp_path / "m.jsonl").stat().st_size


def test_reopening_appends(tmp_path: Path) -> None:
    write(tmp_path / "m.jsonl", 2)
    with MetricsLog(tmp_path / "m.jsonl") as log:
        log.write({"step": 3})
    assert [row["step"] for row in read_metrics(tmp_path / "m.jsonl")] == [1, 2, 3]


def test_what_json_has_no_word_for_is_null(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m.jsonl") as log:
        log.write({"step": 1, "a": math.nan, "b": math.inf, "c": None, "d": 0.5})
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 1, "a": None, "b": None, "c": None, "d": 0.5}


@given(steps=st.integers(0, 12), keep=st.integers(0, 14), torn=st.integers(0, 30))
def test_cutting_keeps_the_first_lines_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory, steps: int, keep: int, torn: int
) -> None:
    path = tmp_path_factory.mktemp("metrics") / "m.jsonl"
    write(path, steps)
    whole = path.read_bytes()
    path.write_bytes(whole + json.dumps({"step": steps + 1, "loss": 0.25}).encode()[:torn])  # a line that was cut off
    assert cut_after(path, keep) == min(steps, keep)
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:keep])


def test_a_file_that_is_missing_is_empty(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "none") == []
    assert cut_after(tmp_path / "m.jsonl", 3) == 0


def test_mfu_is_needed_over_possible() -> None:
    model = preset("tiny", Vocabulary(259))
    per_token = training_flops_per_token(model, 512)
    assert mfu(model, 512, 1000.0, per_token * 4000) == pytest.approx(0.25)
    assert mfu(model, 512, 1000.0, None) is None
