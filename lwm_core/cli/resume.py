"""``lwm resume DIR``: continue a run from its newest good checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from lwm_core.cli.run import add_watching, print_outcome


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the ``lwm`` command."""
    parser = subparsers.add_parser("resume", help="continue a run that was stopped", description=__doc__)
    parser.add_argument("folder", metavar="DIR", type=Path, help="the run's folder")
    add_watching(parser)
    parser.set_defaults(run=run_resume)


def run_resume(args: argparse.Namespace) -> int:
    """Continue the run, say where everything is."""
    from lwm_core.progress import make_progress
    from lwm_core.run import open_run, resume

    log_every = open_run(args.folder)[1].config.run.log_every
    progress = make_progress(log_every, quiet=args.quiet)
    try:
        outcome = resume(args.folder, no_plugins=args.no_plugins, progress=progress)
    finally:
        progress.close()
    print_outcome(outcome, as_json=args.json)
    return 0
