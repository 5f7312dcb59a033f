"""``lwm run RECIPE|FILE``: start a run in a new folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lwm_core.cli.overrides import add_overrides

if TYPE_CHECKING:
    from lwm_core.run import Outcome


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the ``lwm`` command."""
    parser = subparsers.add_parser("run", help="run a recipe or a configuration file", description=__doc__)
    parser.add_argument("source", metavar="RECIPE|FILE", help="the name of a recipe (lwm recipes), or a .toml file")
    add_overrides(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder of the run; it must be new or empty")
    add_watching(parser)
    parser.set_defaults(run=run_run)


def add_watching(parser: argparse.ArgumentParser) -> None:
    """The options that ``run`` and ``resume`` share."""
    parser.add_argument("--no-plugins", action="store_true", help="use lwm-core's own plugins alone")
    parser.add_argument("--quiet", action="store_true", help="show warnings and the last line only")
    parser.add_argument("--json", action="store_true", help="print {folder, status, steps, loss, report} at the end")


def run_run(args: argparse.Namespace) -> int:
    """Load the configuration, run it, say where everything is."""
    from lwm_core.config import load_config
    from lwm_core.progress import make_progress
    from lwm_core.run import run

    loaded = load_config(args.source, args.overrides)
    progress = make_progress(loaded.config.run.log_every, quiet=args.quiet)
    try:
        for note in loaded.notes:
            progress.note(f"note: {note}")
        outcome = run(loaded, args.out, no_plugins=args.no_plugins, progress=progress, command=["lwm", *sys.argv[1:]])
    finally:
        progress.close()
    print_outcome(outcome, as_json=args.json)
    return 0


def print_outcome(outcome: Outcome, *, as_json: bool) -> None:
    """The last line: what is done and where it lies, the report's path last. Of several processes, rank 0 prints it."""
    from lwm_core.launched import launched_rank

    if launched_rank():
        return
    if as_json:
        import json

        print(
            json.dumps(
                {
                    "folder": str(outcome.folder),
                    "status": outcome.status,
                    "steps": outcome.steps,
                    "loss": outcome.loss,
                    "report": None if outcome.report is None else str(outcome.report),
                }
            )
        )
        return
    loss = "" if outcome.loss is None else f", loss {outcome.loss:.4f}"
    state = "was finished before" if outcome.already else "done"
    print(f"{outcome.folder}: {state}, {outcome.steps} steps{loss}; the model is in {outcome.folder / 'model'}")
    if outcome.report is not None:
        print(f"report: {outcome.report}")
