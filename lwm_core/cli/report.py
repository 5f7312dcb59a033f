"""``lwm report DIR``: write a run's report again, from what lies in its folder."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the ``lwm`` command."""
    parser = subparsers.add_parser("report", help="write a run's report", description=__doc__)
    parser.add_argument("folder", metavar="DIR", type=Path, help="the run's folder")
    parser.add_argument("--json", action="store_true", help="print {folder, report}")
    parser.set_defaults(run=run_report)


def run_report(args: argparse.Namespace) -> int:
    """Ask the hooks plugins for a report; the first that writes one counts."""
    import json

    from lwm_core.errors import PluginError
    from lwm_core.registry import Registry, load_hooks
    from lwm_core.run import Run, open_run
    from lwm_core.run.folder import stages_from

    _, loaded, described = open_run(args.folder)
    config = loaded.config
    hooks = load_hooks(Registry.from_environment(config.plugins.allow, config.plugins.deny))
    path = hooks.hook.lwm_report(run=Run(args.folder, config.name, config, stages_from(described)))
    if path is None:
        raise PluginError(f"{args.folder}: no installed plugin has written a report: pip install lwm-evals")
    print(json.dumps({"folder": str(args.folder), "report": str(path)}) if args.json else path)
    return 0
