"""The option ``-s KEY=VALUE`` of the verbs that read a configuration."""

from __future__ import annotations

import argparse


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add it; the texts are in ``args.overrides``."""
    parser.add_argument(
        "-s", dest="overrides", metavar="KEY=VALUE", action="append", default=[], help="override one value; repeatable"
    )
