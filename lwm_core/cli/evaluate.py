"""``lwm eval DIR``: run a run's evaluation suites on what it has trained."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the ``lwm`` command."""
    parser = subparsers.add_parser("eval", help="run a run's evaluation suites again", description=__doc__)
    parser.add_argument("folder", metavar="DIR", type=Path, help="the run's folder")
    parser.add_argument("--suite", metavar="NAME", help="only this one of the run's suites")
    parser.add_argument("--quiet", action="store_true", help="show warnings and the result only")
    parser.add_argument("--json", action="store_true", help="print {suite: [summary rows]}")
    parser.set_defaults(run=run_eval)


def run_eval(args: argparse.Namespace) -> int:
    """Evaluate; finished samples of an earlier evaluation are kept by the suites themselves."""
    import json

    from lwm_core.errors import EndedElsewhereError, UsageError
    from lwm_core.progress import make_progress
    from lwm_core.run import open_run, reopen
    from lwm_core.run.evaluating import Evaluator
    from lwm_core.run.processes import locked, together
    from lwm_core.run.stopping import StoppedError, signals_heard
    from lwm_core.run.suites import Suites

    names = [table.name for table in open_run(args.folder)[1].config.evals]
    if not names:
        raise UsageError(f"{args.folder}: its configuration names no [[evals]]; there is nothing to run")
    opened = reopen(args.folder)
    processes = opened.trainer.processes

    def parts() -> Suites:
        made = Suites(opened.pipeline, opened.pipeline.make_data(), args.suite)
        made.check(processes, training=False)
        return made

    suites = together(processes, parts)
    progress = make_progress(1, quiet=args.quiet)
    try:
        with locked(processes, opened.folder), signals_heard(progress.note) as stop:
            evaluator = Evaluator(opened.trainer, suites, opened.folder, progress, stop)
            results = evaluator.run(opened.stage.name)
    except StoppedError as stopped:
        if processes.rank > 0:
            raise EndedElsewhereError(stopped.exit_code) from None
        raise StoppedError(stopped.signal_number, f"stopped; continue with: lwm eval {args.folder}") from None
    finally:
        progress.close()
    if processes.rank > 0:
        return 0
    if args.json:
        print(json.dumps({name: [dict(row) for row in rows] for name, rows in results.items()}))
        return 0
    for name, rows in results.items():
        for row in rows:
            print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in row.items()))
    return 0
