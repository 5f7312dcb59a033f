"""A suite whose samples are scores of the held-out text; a journal keeps the finished ones."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lwm_core.protocols import EvalContext
from lwm_standin.options import TallyOptions


class Tally:
    """See the module."""

    def __init__(self, options: TallyOptions) -> None:
        self._options = options

    def run(self, context: EvalContext) -> Sequence[Mapping[str, Any]]:
        journal = context.out.with_suffix(".jsonl")
        rows = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
        done = [row for row in rows if row["stage"] == context.stage]
        text = context.held_out()[0]
        for number in range(len(done), self._options.samples):
            time.sleep(self._options.sample_seconds)
            ids = context.tokenizer.encode(text[50 * number : 50 * number + 50])
            row = {"stage": context.stage, "sample": number, "score": float(context.scorer.log_likelihood(ids).mean())}
            with journal.open("a") as file:
                file.write(json.dumps(row) + "\n")
            rows.append(row)
            context.progress(number + 1, self._options.samples)
        mine = [row["score"] for row in rows if row["stage"] == context.stage]
        summary = [{"stage": context.stage, "score": sum(mine) / len(mine), "samples": len(mine)}]
        Path(f"{context.out}.json").write_text(json.dumps({"rows": rows}))
        return summary

    def draw(self, out: Path) -> Mapping[str, bytes]:
        return {}
