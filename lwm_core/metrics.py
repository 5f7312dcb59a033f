"""``metrics.jsonl``: one JSON line a step, flushed as it is written, cut back to the checkpoint on resume.

``tokens`` of a line counts what has been trained on so far, all stages and this step included.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lwm_core.durable import write_whole
from lwm_core.model import ModelConfig, training_flops_per_token

FILE = "metrics.jsonl"


def mfu(model: ModelConfig, seq_len: int, tokens_per_second: float, peak_flops: float | None) -> float | None:
    """Model FLOP/s utilisation in [0, 1]: FLOP/s that the model needs ÷ peak of all devices; None without a peak.

    Source: PaLM (arXiv 2204.02311), appendix B; recomputation is not counted.
    """
    if not peak_flops:
        return None
    return training_flops_per_token(model, seq_len) * tokens_per_second / peak_flops


class MetricsLog:
    """The file, open for appending; use as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab")

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one line; a number that is not finite is written as null, for JSON has no other word."""
        clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self._file.write(json.dumps(clean).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Bring every line to the disk; returns the file's length in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def cut_after(path: Path, step: int) -> int:
    """Drop every line after ``step``, and one that was cut off, by replacing the file at once; returns the lines left.

    Resuming writes those steps again. A crash in between leaves the old file or the new one, never a part.
    """
    kept = [line for line, row in _lines(path) if row["step"] <= step]
    write_whole(path, b"".join(kept))
    return len(kept)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a run so far; a last line that was cut off is left out."""
    return [row for _, row in _lines(path)]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                return
            if not line.endswith(b"\n") or not isinstance(row, dict) or "step" not in row:
                return
            yield line, row
