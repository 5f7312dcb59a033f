"""Suites run on what the trainer holds, and what a finished run leaves: samples, the model's folder, the report."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lwm_core.config.envelope import SampleTable
from lwm_core.pipeline import Pipeline
from lwm_core.progress import Progress
from lwm_core.protocols import EvalSuite, SamplingSpec, Stage, Tokenizer, Trainer
from lwm_core.run.folder import RunFolder
from lwm_core.run.leading import Model, lead
from lwm_core.run.stopping import Stop
from lwm_core.run.suites import Suites
from lwm_core.weights import write_model_folder


class Evaluator:
    """Runs a run's suites; a suite itself continues what was interrupted."""

    def __init__(self, trainer: Trainer, suites: Suites, folder: RunFolder, progress: Progress, stop: Stop) -> None:
        self._trainer = trainer
        self._suites = suites
        self._folder = folder
        self._progress = progress
        self._stop = stop

    def run(self, stage: str) -> dict[str, list[Mapping[str, Any]]]:
        """Evaluate the parameters and RoPE that the trainer has, as ``stage``; the summary rows of each suite.

        The suites run on rank 0, and the other ranks answer along; there are no rows there.

        Raises:
            StoppedError: an end was asked for; finished samples are kept.
        """
        if not self._suites:
            return {}

        def work(model: Model) -> dict[str, list[Mapping[str, Any]]]:
            self._folder.evals.mkdir(exist_ok=True)
            return {name: self._suite(name, suite, stage, model) for name, suite in self._suites.by_name.items()}

        return lead(self._trainer, work, self._stop) or {}

    def _suite(self, name: str, suite: EvalSuite, stage: str, model: Model) -> list[Mapping[str, Any]]:
        def progress(done: int, total: int) -> None:
            self._progress.evaluating(f"{name} after {stage}", done, total)
            self._stop.check()

        summary = list(suite.run(self._suites.context(name, model, stage, self._folder.evals / name, progress)))
        for row in summary:
            facts = " · ".join(f"{key} {_shown(value)}" for key, value in row.items() if key != "stage")
            self._progress.note(f"{name} after {stage}: {facts}")
        self._stop.check()
        return summary


def _shown(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def write_samples(
    path: Path, model: Model, tokenizer: Tokenizer, table: SampleTable, stage: str, seed: int
) -> list[dict[str, Any]]:
    """Continue each prompt and write ``[{stage, prompt, text, tokens_per_second}]``."""
    rows = []
    generator = model.generator()
    for number, prompt in enumerate(table.prompts):
        sampling = SamplingSpec(
            max_new_tokens=table.max_new_tokens,
            temperature=table.temperature,
            top_p=table.top_p,
            stop_ids=tuple(tokenizer.special_ids[role] for role in ("eos",) if role in tokenizer.special_ids),
            seed=seed + number,
        )
        began = time.perf_counter()
        [ids] = generator.generate([tokenizer.encode(prompt)], sampling)
        speed = len(ids) / (time.perf_counter() - began)
        rows.append({"stage": stage, "prompt": prompt, "text": tokenizer.decode(ids), "tokens_per_second": speed})
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return rows


def export_model(folder: Path, pipeline: Pipeline, model: Model, stage: Stage) -> None:
    """Write the parameters as a model folder, in float32 so that nothing is lost, with the tokenizer."""
    write_model_folder(
        folder, pipeline.model, stage.rope, stage.seq_len, model.iter_parameters(), "float32",
        special_ids=pipeline.tokenizer.special_ids,
    )  # fmt: skip
    pipeline.tokenizer.save(folder)
