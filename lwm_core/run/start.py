"""Starting a run in a new folder, and continuing one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lwm_core import metrics
from lwm_core.checkpoint import Found, RunState, disk_full, latest_good, prune, read_state
from lwm_core.config.load import LoadedConfig
from lwm_core.errors import CheckpointError, EndedElsewhereError, LwmError
from lwm_core.launched import launched_world
from lwm_core.pipeline import Pipeline, build
from lwm_core.pipeline.build import trainer_facts
from lwm_core.progress import Progress, make_progress
from lwm_core.protocols import Feed, Processes, Trainer
from lwm_core.registry import Candidate, HookManager, Registry, load_hooks
from lwm_core.run.evaluating import Evaluator, export_model, write_samples
from lwm_core.run.facts import describe_run
from lwm_core.run.folder import DONE, FAILED, RUNNING, STOPPED, Run, RunFolder, open_run
from lwm_core.run.leading import Model, lead
from lwm_core.run.loop import Loop, open_feeds
from lwm_core.run.processes import first, heed, locked, make_trainer, together
from lwm_core.run.stopping import StoppedError, signals_heard
from lwm_core.run.suites import Suites


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Args:
        folder: where it lies.
        status: ``done``; a run that fails or is stopped raises instead.
        steps: steps done in the whole run.
        loss: the last step's.
        report: the report that a plugin has written; None where there is none.
        already: it was finished before.
    """

    folder: Path
    status: str
    steps: int
    loss: float | None
    report: Path | None
    already: bool = False


@dataclass(frozen=True)
class _Parts:
    """What is made and checked before anything is written."""

    pipeline: Pipeline
    trainer: Trainer
    facts: dict[str, Any]
    peak_flops: float | None
    feeds: list[Feed]
    suites: Suites
    hooks: HookManager

    @property
    def processes(self) -> Processes:
        """The processes that the run has."""
        return self.trainer.processes


def run(
    loaded: LoadedConfig,
    out: Path | None = None,
    *,
    registry: Registry | None = None,
    no_plugins: bool = False,
    progress: Progress | None = None,
    command: Sequence[str] = (),
    base_dir: Path = Path("."),
) -> Outcome:
    """Run a configuration from its beginning in the folder ``out`` (default: ``run.out``, or ``runs/NAME``).

    Everything is checked before anything is written. Where several processes run it, all of them call this.

    Raises:
        UsageError: the folder is in use or not empty.
        LwmError: as its kind says.
        StoppedError: a signal asked for an end; the run is saved.
        EndedElsewhereError: another process of the run failed or was stopped, and says why.
    """
    config = loaded.config
    folder = RunFolder(out or Path(config.run.out or f"runs/{config.name}"))
    if launched_world() == 1:  # of several, rank 0 looks once they know each other and all can hear of it
        folder.refuse_if_used()
    progress = progress or make_progress(config.run.log_every, quiet=True)
    if registry is None:
        registry = Registry.from_environment(config.plugins.allow, config.plugins.deny, no_plugins)
    parts = _make(loaded, registry, base_dir, progress)
    candidates = _hook_candidates(registry, parts.hooks)

    def begin() -> None:
        folder.refuse_if_used()
        folder.write(describe_run(parts.pipeline, parts.facts, candidates, command, parts.processes.world))

    first(parts.processes, folder.refuse_if_used)
    with locked(parts.processes, folder):
        first(parts.processes, begin)
        return _execute(parts, folder, None, None, progress)


def resume(path: Path, *, no_plugins: bool = False, progress: Progress | None = None) -> Outcome:
    """Continue the run in ``path`` from its newest good checkpoint.

    Raises:
        UsageError: it is no run, or another process is running it.
        CheckpointError: there are checkpoints but none is good, or the run's model is not what it was.
        LwmError, StoppedError: as :func:`run`.
    """
    folder, loaded, described = open_run(path)
    progress = progress or make_progress(loaded.config.run.log_every, quiet=True)
    if described.get("status") == DONE:
        rows = metrics.read_metrics(folder.metrics)
        report = described.get("report")
        loss = rows[-1]["loss"] if rows else None
        return Outcome(path, DONE, len(rows), loss, Path(report) if report else None, already=True)
    with ExitStack() as stack:
        if launched_world() == 1:
            stack.enter_context(folder.locked())  # before anything is made: devices may serve one process alone
        config = loaded.config
        registry = Registry.from_environment(config.plugins.allow, config.plugins.deny, no_plugins)
        parts = _make(loaded, registry, Path(described.get("base_dir", ".")), progress)
        processes = parts.processes
        if launched_world() > 1:
            stack.enter_context(locked(processes, folder))
        state, name = None, None
        standing = first(processes, lambda: _standing(folder, described, parts, progress))
        if standing is not None:
            name, values = standing
            state = RunState(**values)
        return _execute(parts, folder, state, None if name is None else folder.checkpoints / name, progress)


def _standing(
    folder: RunFolder, described: dict[str, Any], parts: _Parts, progress: Progress
) -> tuple[str, dict[str, Any]] | None:
    """Find where the run stands and take it up there: name and state of the checkpoint, None for the beginning."""
    path = folder.path
    found = latest_good(folder.checkpoints)
    _tell_refused(found, progress)
    state = None
    if found.path is not None:
        state = read_state(found.path)
        progress.note(f"continuing {path} from {found.path.name} (stage {state.stage!r}, step {state.stage_step})")
    elif found.refused:
        raise CheckpointError(
            f"{path}: none of its checkpoints is good; move {folder.checkpoints} away to start the run over"
        )
    else:
        progress.note(f"{path} has no checkpoint yet; starting it over")
    _check_same(parts.pipeline, described, path)
    if not found.refused:  # what the kill of a save has left over; beside a bad one every older one may be needed
        prune(folder.checkpoints, parts.pipeline.loaded.config.run.keep_checkpoints)
    lines = metrics.cut_after(folder.metrics, state.step if state else 0)
    if state is not None and lines < state.step:
        lost = state.step - lines
        progress.note(f"warning: {folder.metrics}: {lost} of the {state.step} steps that are done are lost in it")
    folder.update(status=RUNNING, processes=parts.processes.world)
    return None if found.path is None or state is None else (found.path.name, asdict(state))


def _make(loaded: LoadedConfig, registry: Registry, base_dir: Path, progress: Progress) -> _Parts:
    hooks = load_hooks(registry)
    hooks.check_pending()
    pipeline = build(loaded, registry, select=hooks.select, base_dir=base_dir)
    for one in pipeline.selection.plugged:
        if one.asked == "auto":
            progress.note(f"auto: {one.choice.explain()}")
    trainer = make_trainer(pipeline)

    def rest() -> _Parts:
        facts, devices, peak = trainer_facts(trainer)
        pipeline.check_stages(devices, facts.get("device_hint"))
        data = pipeline.make_data()
        suites = Suites(pipeline, data)
        suites.check(trainer.processes, training=True)
        feeds = open_feeds(data, trainer, pipeline.stages)
        if trainer.processes.rank == 0:
            hooks.configure(loaded.config)
        return _Parts(pipeline, trainer, dict(facts), peak, feeds, suites, hooks)

    return together(trainer.processes, rest)


def _execute(
    parts: _Parts, folder: RunFolder, state: RunState | None, checkpoint: Path | None, progress: Progress
) -> Outcome:
    """The run itself with everything around it: signals, hooks told, the end written down."""
    pipeline, hooks, processes = parts.pipeline, parts.hooks, parts.processes
    run = Run(folder.path, pipeline.loaded.config.name, pipeline.loaded.config, pipeline.stages)
    status = FAILED
    began = time.time()
    try:
        with signals_heard(progress.note) as stop:
            evaluator = Evaluator(parts.trainer, parts.suites, folder, progress, stop)
            loop = Loop(
                pipeline, parts.trainer, parts.feeds, folder, run, hooks, evaluator, progress, stop, parts.peak_flops
            )
            together(processes, lambda: None if processes.rank else hooks.hook.lwm_run_start(run=run))
            loop.execute(state, checkpoint)
            heed(processes, stop)
            lead(parts.trainer, lambda model: _finish(pipeline, model, folder))
        status = DONE
        steps, loss, report = first(processes, lambda: _end(folder, hooks, run, time.time() - began))
        return Outcome(folder.path, DONE, loop.step or steps, loss, None if report is None else Path(report))
    except StoppedError as stopped:
        status = STOPPED
        if processes.rank > 0:
            raise EndedElsewhereError(stopped.exit_code) from None
        line = f"stopped; continue with: lwm resume {folder.path}"
        raise StoppedError(stopped.signal_number, line) from None
    except OSError as error:
        if disk_full(error):
            raise CheckpointError(
                f"{folder.path}: the disk is full; free space, then lwm resume {folder.path}", details=repr(error)
            ) from error
        raise
    finally:
        if processes.rank == 0:
            if status != DONE:
                _note_status(folder, status)
            hooks.hook.lwm_run_end(run=run, status=status)
        progress.close()


def _finish(pipeline: Pipeline, model: Model, folder: RunFolder) -> None:
    """Write the samples and the trained model."""
    config = pipeline.loaded.config
    last = pipeline.stages[-1]
    if config.samples.prompts:
        path = folder.samples / "text.json"
        write_samples(path, model, pipeline.tokenizer, config.samples, last.name, config.seed)
    export_model(folder.model, pipeline, model, last)


def _end(folder: RunFolder, hooks: HookManager, run: Run, seconds: float) -> tuple[int, float | None, str | None]:
    """Write down that the run is done and have its report made: steps, last loss, and where the report lies."""
    folder.update(status=DONE, finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"), seconds=seconds)
    report = hooks.hook.lwm_report(run=run)
    folder.update(report=None if report is None else str(report))
    rows = metrics.read_metrics(folder.metrics)
    return len(rows), rows[-1]["loss"] if rows else None, None if report is None else str(report)


def _note_status(folder: RunFolder, status: str) -> None:
    """Write down how the run ended, if that is still possible: a full disk must not hide what went wrong."""
    try:
        folder.update(status=status)
    except (OSError, LwmError):
        return


def _tell_refused(found: Found, progress: Progress) -> None:
    for path, reason in found.refused:
        progress.note(f"warning: checkpoint {path} is refused: {reason}")
    for path in found.unfinished:
        progress.note(f"checkpoint {path} is passed over: its saving was cut off")


def _check_same(pipeline: Pipeline, described: dict[str, Any], path: Path) -> None:
    """A checkpoint fits only the model and the stages it was made with."""
    was = {key: value for key, value in described["model"].items() if key != "parameter_count"}
    now = pipeline.model.to_dict()
    changed = next((key for key in now if now[key] != was.get(key)), None)
    if changed is not None:
        raise CheckpointError(
            f"{path}: the model's {changed} was {was.get(changed)} when the run started and is {now[changed]} now; "
            "the starting model or the tokenizer has changed"
        )
    lengths = [(stage["seq_len"], stage["tokens"], stage["batch_tokens"]) for stage in described["stages"]]
    if lengths != [(stage.seq_len, stage.tokens, stage.batch_tokens) for stage in pipeline.stages]:
        raise CheckpointError(f"{path}: the schedule is not what it was when the run started; install the same plugins")


def _hook_candidates(registry: Registry, hooks: HookManager) -> list[Candidate]:
    return [c for c in registry.candidates("hooks") if c.label in hooks.names]
