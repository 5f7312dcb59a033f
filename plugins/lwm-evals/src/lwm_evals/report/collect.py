"""What a run's folder holds, read with tolerance: a run may be unfinished, and a part may be missing or damaged.

A damaged part is named in ``RunData.notes``, which the page shows; nothing is left out in silence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lwm_core.errors import UsageError
from lwm_core.metrics import FILE as METRICS
from lwm_core.metrics import read_metrics

Row = dict[str, Any]

_REAL = (int, float)
_NEEDLE_ROW: Mapping[str, Any] = {"stage": str, "length": int, "depth": _REAL, "retrieved": int, "answer": str}
_NEEDLE_SUMMARY: Mapping[str, Any] = {"stage": str, "length": int, "accuracy": _REAL, "samples": int}
_LOSS: Mapping[str, Any] = {"stage": str, "frames": int, "length": int, "nats": _REAL, "uniform": _REAL, "samples": int}
_RECONSTRUCTION: Mapping[str, Any] = {
    "frames": int,
    "ssim": _REAL,
    "codes_used": int,
    "usage": _REAL,
    "perplexity": _REAL,
}
_CONTINUATION: Mapping[str, Any] = {"stage": str, "written": int, "codes_equal": _REAL}


@dataclass(frozen=True)
class StageMetrics:
    """The steps of one stage, in order."""

    name: str
    index: int
    rows: list[Row]

    def values(self, name: str) -> list[float]:
        """``name`` at each step; NaN where a step does not have it."""
        return [number(row.get(name)) for row in self.rows]


@dataclass(frozen=True)
class RunData:
    """A run as it lies on disk.

    Args:
        folder: the run's folder.
        run: ``run.json``; empty where it is missing.
        stages: steps by stage, from ``metrics.jsonl``.
        needles: name → ``rows`` and ``summary`` of every suite that asks at lengths and depths, as ``needle`` and
            ``video-needle`` do.
        losses: name → summary rows of every suite that tells nats by frames, as ``video-loss`` does.
        reconstructions: name → summary row and the PNG beside it, of every suite like ``reconstruction``.
        continuations: name → summary rows and the PNG beside them, of every suite like ``video-continuation``.
        suites: name → summary rows of every other suite.
        samples: ``{stage, prompt, text}`` rows of ``samples/*.json``.
        notes: what could not be read.
    """

    folder: Path
    run: Mapping[str, Any] = field(default_factory=dict)
    stages: list[StageMetrics] = field(default_factory=list)
    needles: Mapping[str, Mapping[str, list[Row]]] = field(default_factory=dict)
    losses: Mapping[str, list[Row]] = field(default_factory=dict)
    reconstructions: Mapping[str, tuple[Row, bytes | None]] = field(default_factory=dict)
    continuations: Mapping[str, tuple[list[Row], bytes | None]] = field(default_factory=dict)
    suites: Mapping[str, list[Row]] = field(default_factory=dict)
    samples: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def schedule(self) -> list[Row]:
        """The stages as ``run.json`` has them."""
        return rows_of(self.run.get("stages"))

    def table(self, name: str) -> Mapping[str, Any]:
        """A table of ``run.json``; empty where it is missing or something else."""
        value = self.run.get(name)
        return value if isinstance(value, Mapping) else {}


def read_run(folder: Path) -> RunData:
    """Read a run's folder.

    Raises:
        UsageError: nothing of a run lies there.
    """
    if not any((folder / name).exists() for name in ("run.json", METRICS, "evals")):
        raise UsageError(f"report: {folder} is not a run: it has no run.json, {METRICS} or evals; name a run's folder")
    notes: list[str] = []
    run = _json(folder / "run.json", notes)
    suites: dict[str, list[Row]] = {}
    needles: dict[str, dict[str, list[Row]]] = {}
    losses: dict[str, list[Row]] = {}
    reconstructions: dict[str, tuple[Row, bytes | None]] = {}
    continuations: dict[str, tuple[list[Row], bytes | None]] = {}
    for path in sorted((folder / "evals").glob("*.json")):
        table = _json(path, notes)
        summary = rows_of(table.get("summary") if isinstance(table, Mapping) else table)
        if isinstance(table, Mapping) and any("depth" in row for row in rows_of(table.get("rows"))):
            needles[path.stem] = _needle(table, path, notes)
        elif any("nats" in row and "frames" in row for row in summary):
            losses[path.stem] = _kept(summary, _LOSS, f"{path.name}: {{}} summary", notes)
        elif len(summary) == 1 and _complete(summary[0], _RECONSTRUCTION):
            reconstructions[path.stem] = summary[0], _png(path.with_suffix(".png"), notes)
        elif any("codes_equal" in row for row in summary):
            rows = _kept(summary, _CONTINUATION, f"{path.name}: {{}} summary", notes)
            continuations[path.stem] = rows, _png(path.with_suffix(".png"), notes)
        elif summary:
            suites[path.stem] = summary
    samples: list[Row] = []
    for path in sorted((folder / "samples").glob("*.json")):
        found = _json(path, notes)
        samples += rows_of(found if isinstance(found, list) else [found])
    described = run if isinstance(run, Mapping) else {}
    return RunData(
        folder, described, _stages(folder, notes), needles, losses, reconstructions, continuations, suites, samples,
        notes,
    )  # fmt: skip


def number(value: object) -> float:
    """``value`` as a number; NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return float("nan")
    return float(value)


def rows_of(value: object) -> list[Row]:
    """The tables of a list; an empty list for anything else."""
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def _needle(table: Mapping[str, Any], path: Path, notes: list[str]) -> dict[str, list[Row]]:
    """The rows and cells that have what a figure needs; a note tells how many have not."""
    checks = {"rows": _NEEDLE_ROW, "summary": _NEEDLE_SUMMARY}
    if any("frames" in row for row in rows_of(table.get("rows"))):
        checks = {
            "rows": {**_NEEDLE_ROW, "frames": int},
            "summary": {**_NEEDLE_SUMMARY, "frames": int, "chance": _REAL},
        }
    return {name: _kept(rows_of(table.get(name)), fields, f"{path.name}: {{}} {name}", notes)
            for name, fields in checks.items()}  # fmt: skip


def _kept(found: list[Row], fields: Mapping[str, Any], what: str, notes: list[str]) -> list[Row]:
    """The complete ones of ``found``; a note tells how many are not, in the words of ``what``."""
    kept = [row for row in found if _complete(row, fields)]
    if len(kept) < len(found):
        notes.append(f"{what.format(f'{len(found) - len(kept)} of {len(found)}')} are not complete")
    return kept


def _complete(row: Row, fields: Mapping[str, Any]) -> bool:
    if not all(isinstance(row.get(key), kind) for key, kind in fields.items()):
        return False
    counts = all(row[key] > 0 for key in ("length", "frames") if key in fields)
    return counts and all(math.isfinite(row[key]) for key, kind in fields.items() if kind is not str)


def _png(path: Path, notes: list[str]) -> bytes | None:
    """A picture's bytes; a note where it is something else, for it goes into the page as it is."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}")
        return None
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        notes.append(f"{path.name} is no PNG")
        return None
    return data


def _stages(folder: Path, notes: list[str]) -> list[StageMetrics]:
    stages: list[StageMetrics] = []
    try:
        rows = read_metrics(folder / METRICS)
    except OSError as error:
        notes.append(f"{METRICS} cannot be read: {error.strerror}")
        rows = []
    for row in rows:
        index = row.get("stage_index")
        key = (index if isinstance(index, int) else -1, str(row.get("stage", "")))
        if not stages or (stages[-1].index, stages[-1].name) != key:
            stages.append(StageMetrics(key[1], key[0], []))
        stages[-1].rows.append(row)
    return stages


def _json(path: Path, notes: list[str]) -> Any:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read: {error}")
        return {}
