"""``lwm generate DIR text``: continue a prompt with a run's model, printed as it is written."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lwm_core.run import Model, Reopened


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the ``lwm`` command."""
    parser = subparsers.add_parser("generate", help="write with a run's model", description=__doc__)
    parser.add_argument("folder", metavar="DIR", type=Path, help="the run's folder")
    parser.add_argument("modality", choices=("text",), help="what to write")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to continue; - reads standard input")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="tokens at most (128)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy (0.8)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest; 0 from all (0)")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P", help="draw from the likeliest whose "
                        "probability reaches P (0.95)")  # fmt: skip
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P", help="draw from those at least P times as "
                        "probable as the likeliest; 0 from all (0)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the draw (0)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("--json", action="store_true", help="print {prompt, text, tokens, tokens_per_second, source}")
    parser.set_defaults(run=run_generate)


def run_generate(args: argparse.Namespace) -> int:
    """Load the model and write. Of several processes, rank 0 reads and prints, and the others answer along."""
    from lwm_core.run import lead, reopen

    _check(args)
    opened = reopen(args.folder)
    lead(opened.trainer, lambda model: _write(args, opened, model))
    return 0


def _write(args: argparse.Namespace, opened: Reopened, model: Model) -> None:
    import json
    import time

    from lwm_core.protocols import SamplingSpec

    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    tokenizer = opened.pipeline.tokenizer
    sampling = SamplingSpec(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        stop_ids=tuple(tokenizer.special_ids[role] for role in ("eos",) if role in tokenizer.special_ids),
        seed=args.seed,
    )
    count = 0

    def counted() -> Iterator[int]:
        nonlocal count
        for one in model.generator().stream(tokenizer.encode(prompt), sampling):
            count += 1
            yield one

    began = time.perf_counter()
    pieces = []
    for piece in stream_text(counted(), tokenizer.decode, args.stop):
        pieces.append(piece)
        if not args.json:
            print(piece, end="", flush=True)
    if not args.json:
        print()
        return
    seconds = time.perf_counter() - began
    facts = {"prompt": prompt, "text": "".join(pieces), "tokens": count, "tokens_per_second": count / seconds}
    print(json.dumps({**facts, "source": str(opened.source)}))


def _check(args: argparse.Namespace) -> None:
    from lwm_core.errors import UsageError

    for name, good, expected in (
        ("max-new-tokens", args.max_new_tokens > 0, "at least 1"),
        ("temperature", args.temperature >= 0, "0 or more"),
        ("top-k", args.top_k >= 0, "0 or more"),
        ("top-p", 0 < args.top_p <= 1, "above 0 and at most 1"),
        ("min-p", 0 <= args.min_p <= 1, "from 0 to 1"),
        ("prompt", bool(args.prompt), "a text"),
        ("stop", all(args.stop), "a text"),
    ):
        if not good:
            raise UsageError(f"--{name} is {getattr(args, name.replace('-', '_'))!r}; expected {expected}")


def stream_text(ids: Iterator[int], decode: Callable[[Sequence[int]], str], stops: Sequence[str]) -> Iterator[str]:
    """The text of ``ids`` as it grows, up to the first of ``stops``.

    What may still change is held back: an unfinished character (it decodes to U+FFFD) and the beginning of a stop.
    """
    seen: list[int] = []
    shown = 0
    text = ""
    longest = max(map(len, stops), default=1) - 1
    for one in ids:
        seen.append(one)
        text = decode(seen)
        ends = [at for stop in stops if (at := text.find(stop)) >= 0]
        if ends:
            yield text[shown : min(ends)]
            return
        settled = len(text.rstrip("\ufffd"))
        settled = min(settled, len(text) - longest)
        if settled > shown:
            yield text[shown:settled]
            shown = settled
    if len(text) > shown:
        yield text[shown:]
