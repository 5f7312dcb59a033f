"""The loop itself: one stage after the other, a step at a time.

Every process of a run goes through it in step. Only rank 0 writes, calls hooks and shows anything; where it does, the
others learn whether it went well before they go on.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from lwm_core.checkpoint import MANIFEST, TRAINER, RunState, step_folders
from lwm_core.errors import TrainingError
from lwm_core.metrics import MetricsLog, mfu
from lwm_core.pipeline import Pipeline
from lwm_core.progress import Progress
from lwm_core.protocols import DataSource, Feed, FeedRequest, Stage, Trainer
from lwm_core.registry import HookManager
from lwm_core.run.evaluating import Evaluator
from lwm_core.run.folder import Run, RunFolder
from lwm_core.run.prefetch import batches
from lwm_core.run.processes import first, heed, together
from lwm_core.run.saving import Saver
from lwm_core.run.stopping import Stop, StoppedError


class Loop:
    """A run from where it stands to the end of its last stage.

    Args:
        pipeline: its parts.
        trainer: parameters and optimizer.
        feeds: the feed of each stage.
        folder: where everything goes.
        run: what hooks are told.
        hooks: who is told.
        evaluator: runs the suites.
        progress: what people see.
        stop: whether an end was asked for.
        peak_flops: of all devices together, for MFU; None where it is not known.
    """

    def __init__(
        self, pipeline: Pipeline, trainer: Trainer, feeds: list[Feed], folder: RunFolder, run: Run, hooks: HookManager,
        evaluator: Evaluator, progress: Progress, stop: Stop, peak_flops: float | None,
    ) -> None:  # fmt: skip
        self._pipeline = pipeline
        self._trainer = trainer
        self._processes = trainer.processes
        self._feeds = feeds
        self._folder = folder
        self._run = run
        self._hooks = hooks
        self._evaluator = evaluator
        self._progress = progress
        self._stop = stop
        self._peak_flops = peak_flops
        self._step = 0
        config = pipeline.loaded.config.run
        self._checkpoint_every = config.checkpoint_every
        self._saver = Saver(self._processes, folder.checkpoints, config.keep_checkpoints, self._committed)

    @property
    def step(self) -> int:
        """Steps done in the whole run."""
        return self._step

    def execute(self, state: RunState | None, checkpoint: Path | None) -> None:
        """Train what is left of every stage and evaluate after each.

        Args:
            state: where the run stands; None for its beginning.
            checkpoint: the checkpoint that the state is from.

        Raises:
            TrainingError: a loss or gradient norm is not finite.
            CheckpointError: a checkpoint cannot be written.
            StoppedError: an end was asked for; everything that was trained is saved.
        """
        try:
            path = Path(os.devnull) if self._processes.rank else self._folder.metrics
            with together(self._processes, lambda: MetricsLog(path)) as log:
                if state is None:
                    self._load_start()
                old: Stage | None = None
                for index, stage in enumerate(self._pipeline.stages):
                    if state is None or index >= state.stage_index:
                        self._stage(index, stage, old, state, checkpoint, log)
                        state = None
                    old = stage
        finally:
            self._saver.close()
            for feed in self._feeds:
                feed.close()

    def _load_start(self) -> None:
        """Take the starting model's parameters, and evaluate it before anything is trained."""
        if self._pipeline.weights is None:
            return
        base = self._pipeline.base_stage()
        self._trainer.begin_stage(base)
        self._trainer.load_parameters(self._pipeline.weights.parameters)
        if self._pipeline.loaded.config.run.eval_base:
            self._evaluator.run(base.name)

    def _stage(
        self, index: int, stage: Stage, old: Stage | None, state: RunState | None, checkpoint: Path | None,
        log: MetricsLog,
    ) -> None:  # fmt: skip
        self._trainer.begin_stage(stage)
        done = 0
        if state is not None and checkpoint is not None:
            self._trainer.restore(checkpoint / TRAINER)
            self._step, done = state.step, state.stage_step
        first(self._processes, lambda: self._stage_begins(stage, old, done))
        self._train(index, stage, done, log)
        heed(self._processes, self._stop)
        self._evaluator.run(stage.name)

    def _stage_begins(self, stage: Stage, old: Stage | None, done: int) -> None:
        self._hooks.hook.lwm_stage_change(run=self._run, old=old, new=stage)
        self._progress.begin_stage(stage, done)
        for line in self._trainer.choices():
            self._progress.note(line)

    def _train(self, index: int, stage: Stage, done: int, log: MetricsLog) -> None:
        rows = batches(self._feeds[index], self._trainer.layout, stage.seq_len, done, stage.steps)
        with closing(rows):
            for stage_step in range(done, stage.steps):
                # Waiting for the batch is part of the step: tokens/s is what the run really does.
                began = time.perf_counter()
                batch = together(self._processes, partial(next, rows))
                metrics = self._trainer.step(batch, stage_step)
                seconds = time.perf_counter() - began
                self._step += 1
                tell = partial(self._step_ends, metrics, index, stage, stage_step, seconds, log)
                together(self._processes, tell, self._stop)
                stopping = self._stop.agreed
                if stage_step + 1 == stage.steps or stopping or self._step % self._checkpoint_every == 0:
                    length = first(self._processes, log.sync)
                    here = RunState(self._step, index, stage.name, stage_step + 1, length)
                    self._saver.save(self._trainer, here)
                if stopping:
                    self._saver.wait()
                    raise StoppedError(stopping)
        self._saver.wait()

    def _step_ends(
        self, metrics: Mapping[str, float], index: int, stage: Stage, stage_step: int, seconds: float, log: MetricsLog
    ) -> None:
        """Rank 0 writes the step down and tells of it."""
        if self._processes.rank:
            return
        self._check_finite(metrics, stage, stage_step)
        row = self._row(metrics, index, stage, stage_step, seconds)
        log.write(row)
        self._progress.step(row)
        self._hooks.hook.lwm_step_end(run=self._run, step=self._step, metrics=row)
        self._saver.poll()

    def _row(
        self, metrics: Mapping[str, float], index: int, stage: Stage, stage_step: int, seconds: float
    ) -> dict[str, Any]:
        speed = stage.batch_tokens / seconds
        before = sum(one.steps * one.batch_tokens for one in self._pipeline.stages[:index])
        return {
            "step": self._step,
            "stage": stage.name,
            "stage_index": index,
            "stage_step": stage_step + 1,
            "tokens": before + (stage_step + 1) * stage.batch_tokens,
            **{key: float(value) for key, value in metrics.items()},
            "step_seconds": seconds,
            "tokens_per_second": speed,
            "mfu": mfu(self._pipeline.model, stage.seq_len, speed, self._peak_flops),
            "time": time.time(),
        }

    def _check_finite(self, metrics: Mapping[str, float], stage: Stage, stage_step: int) -> None:
        bad = next((key for key in ("loss", "grad_norm") if not math.isfinite(metrics[key])), None)
        if bad is None:
            return
        self._saver.settle()
        good = next((path for path in step_folders(self._folder.checkpoints) if (path / MANIFEST).exists()), None)
        kept = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
        raise TrainingError(
            f"{bad} is {float(metrics[bad])} at step {self._step} (step {stage_step + 1} of stage "
            f"{stage.name!r}); {kept}, and nothing was written over it; lower the learning rate (lr = {stage.lr}) "
            "or lengthen its warm-up"
        )

    def _committed(self, path: Path) -> None:
        self._hooks.hook.lwm_checkpoint(run=self._run, path=path)


def open_feeds(data: DataSource, trainer: Trainer, stages: tuple[Stage, ...]) -> list[Feed]:
    """This process's feed of every stage, opened before the first step so that what does not fit is refused at once."""
    return [
        data.open(FeedRequest(index, stage.seq_len, stage.rows, *trainer.data_rank(stage), mix=stage.mix))
        for index, stage in enumerate(stages)
    ]
