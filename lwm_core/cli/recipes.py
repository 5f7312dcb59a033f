"""``lwm recipes``: the recipes that ship, each with its one line."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the ``lwm`` command."""
    parser = subparsers.add_parser("recipes", help="list the recipes that ship", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print a JSON list of {name, summary}")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the recipes in order of their names."""
    import json

    from lwm_core.config.read import read_source, recipe_names

    recipes = [{"name": name, "summary": str(read_source(name).data.get("summary", ""))} for name in recipe_names()]
    if args.json:
        print(json.dumps(recipes, indent=2, ensure_ascii=False))
        return 0
    width = max((len(one["name"]) for one in recipes), default=0)
    for one in recipes:
        print(f"{one['name']:{width}}  {one['summary']}".rstrip())
    return 0
