"""What the needle suites share: how many samples a length gets, batches with a journal, the results' file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lwm_core.protocols import EvalContext, EvalSetup
from lwm_evals.files import Journal, Row, write_atomically
from lwm_evals.options import GridOptions


def known_lengths(setup: EvalSetup) -> list[int]:
    """Every stage's length and the starting model's, where it has one; each once, shortest first."""
    return sorted({stage.seq_len for stage in setup.stages} | ({setup.start_seq_len} if setup.start_seq_len else set()))


def plan_samples(lengths: Sequence[int], options: GridOptions, context: EvalContext) -> dict[int, int]:
    """Length → samples at ``context.stage``; the last of ``lengths`` gets more where the options say so."""
    plan = dict.fromkeys(lengths, options.samples)
    ends = {"base", context.stages[-1].name} if context.stages else {context.stage}
    if options.samples_longest_at == "all" or context.stage in ends:
        plan[lengths[-1]] = options.samples_longest
    return plan


def ask_all(
    context: EvalContext,
    journal: Journal,
    plan: Mapping[int, int],
    batch_tokens: int,
    ask: Callable[[int, Sequence[int], int], Iterable[Row]],
) -> None:
    """Have the samples of a stage that the journal lacks answered, batch by batch.

    Args:
        context: whose stage it is, and who hears of progress.
        journal: takes the rows of each batch before the next begins.
        plan: length in tokens → samples, numbered from 0.
        batch_tokens: tokens of a batch; one sample may have more.
        ask: (length, samples, rows to fill the batch up to) → a row for each sample.
    """
    remaining = {
        length: [i for i in range(count) if (context.stage, length, i) not in journal.rows]
        for length, count in plan.items()
    }
    total = sum(plan.values())
    done = total - sum(map(len, remaining.values()))
    context.progress(done, total)
    for length, samples in remaining.items():
        size = batch_size(len(samples), batch_tokens // length)
        for start in range(0, len(samples), size):
            batch = samples[start : start + size]
            journal.append(ask(length, batch, size))
            done += len(batch)
            context.progress(done, total)


def batch_size(samples: int, most: int) -> int:
    """Rows of the smallest equal batches that do ``samples`` in no more batches than ``most`` rows a batch would."""
    batches = max(1, -(-samples // max(1, most)))
    return max(1, -(-samples // batches))


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Stages in the order in which they were evaluated, then by length and sample."""
    listed = list(rows)
    stages = list(dict.fromkeys(row["stage"] for row in listed))
    return sorted(listed, key=lambda row: (stages.index(row["stage"]), row["length"], row["sample"]))


def write_results(out: Path, fields: Sequence[str], rows: Iterable[Row], summary: Sequence[Row]) -> None:
    """Write ``<out>.json``: the named fields of ``rows``, and ``summary``."""
    results = {"rows": [{name: row[name] for name in fields} for row in rows], "summary": list(summary)}
    write_atomically(beside(out, ".json"), (json.dumps(results, indent=1) + "\n").encode())


def read_results(out: Path) -> dict[str, Any]:
    """``rows`` and ``summary`` of ``<out>.json``, both empty where there is no such file."""
    path = beside(out, ".json")
    if not path.exists():
        return {"rows": [], "summary": []}
    return dict(json.loads(path.read_text(encoding="utf-8")))


def beside(out: Path, ending: str) -> Path:
    """The file of a suite with this ending."""
    return out.with_name(f"{out.name}{ending}")
