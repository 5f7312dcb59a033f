"""What the verbs that write share: the options that say how tokens are drawn, and a word about speed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lwm_core.protocols import SamplingSpec, Tokenizer


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="tokens at most (128)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy (0.8)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest; 0 from all (0)")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P", help="draw from the likeliest whose "
                        "probability reaches P (0.95)")  # fmt: skip
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P", help="draw from those at least P times as "
                        "probable as the likeliest; 0 from all (0)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the draw (0)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")


def check_sampling(args: argparse.Namespace) -> None:
    """Raise UsageError for an option that makes no sense."""
    rows = [
        ("max-new-tokens", args.max_new_tokens > 0, "at least 1"),
        ("temperature", args.temperature >= 0, "0 or more"),
        ("top-k", args.top_k >= 0, "0 or more"),
        ("top-p", 0 < args.top_p <= 1, "above 0 and at most 1"),
        ("min-p", 0 <= args.min_p <= 1, "from 0 to 1"),
        ("stop", all(args.stop), "a text"),
    ]
    check_options(args, rows)


def check_options(args: argparse.Namespace, rows: Iterable[tuple[str, bool, str]]) -> None:
    """Raise UsageError for the first of (option, whether it is good, what was expected) that is not."""
    from lwm_core.errors import UsageError

    for name, good, expected in rows:
        if not good:
            raise UsageError(f"--{name} is {getattr(args, name.replace('-', '_'))!r}; expected {expected}")


def sampling_of(args: argparse.Namespace, tokenizer: Tokenizer) -> SamplingSpec:
    """What the options say; the tokenizer's ``eos`` ends a text."""
    from lwm_core.protocols import SamplingSpec

    return SamplingSpec(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        stop_ids=tuple(tokenizer.special_ids[role] for role in ("eos",) if role in tokenizer.special_ids),
        seed=args.seed,
    )


def say_aside(line: str) -> None:
    """A line on standard error, dim in a terminal."""
    print(f"\033[2m{line}\033[0m" if sys.stderr.isatty() else line, file=sys.stderr, flush=True)
