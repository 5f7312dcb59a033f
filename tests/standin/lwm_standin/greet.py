"""A verb of a plugin's own."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``lwm greet``."""
    parser = subparsers.add_parser("greet", help="say hello")
    parser.add_argument("who")
    parser.set_defaults(run=lambda args: print(f"hello {args.who}") or 0)
