"""The option ``-s KEY=VALUE`` of the verbs that read a configuration."""

from __future__ import annotations

import argparse


def add_overrides(parser: argparse.ArgumentParser, what: str = "override one value") -> None:
    """Add it; the texts are in ``args.overrides``. ``what`` it sets is told by help."""
    parser.add_argument(
        "-s", dest="overrides", metavar="KEY=VALUE", action="append", default=[], help=f"{what}; repeatable"
    )
