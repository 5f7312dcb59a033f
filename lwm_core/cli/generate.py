"""``lwm generate DIR text|image|video``: what a run's model writes; here text, printed as it is written."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lwm_core.cli.generate_frames import add_frames
from lwm_core.cli.overrides import add_overrides
from lwm_core.cli.sampling import add_sampling, check_sampling, sampling_of, say_aside

if TYPE_CHECKING:
    from lwm_core.run import Model, Reopened


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the ``lwm`` command."""
    top = subparsers.add_parser(
        "generate", help="write text, a picture or a video with a run's model",
        description="Write with a run's model: text, a picture or a video.",
    )  # fmt: skip
    top.add_argument("folder", metavar="DIR", type=Path, help="the run's folder")
    modalities = top.add_subparsers(dest="modality", metavar="text|image|video", required=True, help="what to write")
    parser = modalities.add_parser("text", help="continue a prompt", description="Continue a prompt.")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to continue; - reads standard input")
    add_sampling(parser)
    add_overrides(parser)
    parser.add_argument("--json", action="store_true", help="print {prompt, text, tokens, tokens_per_second, source}")
    parser.set_defaults(run=run_generate)
    add_frames(modalities)


def run_generate(args: argparse.Namespace) -> int:
    """Load the model and write. Of several processes, rank 0 reads and prints, and the others answer along."""
    from lwm_core.errors import UsageError
    from lwm_core.run import lead, reopen

    check_sampling(args)
    if not args.prompt:
        raise UsageError("--prompt is ''; expected a text")
    opened = reopen(args.folder, args.overrides)
    lead(opened.trainer, lambda model: _write(args, opened, model))
    return 0


def _write(args: argparse.Namespace, opened: Reopened, model: Model) -> None:
    import json
    import time

    from lwm_core.run.streaming import stream_text

    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    tokenizer = opened.pipeline.tokenizer
    count = 0

    def counted() -> Iterator[int]:
        nonlocal count
        for one in model.generator().stream(tokenizer.encode(prompt), sampling_of(args, tokenizer)):
            count += 1
            yield one

    began = time.perf_counter()
    pieces = []
    for piece in stream_text(counted(), tokenizer.decode, args.stop):
        pieces.append(piece)
        if not args.json:
            print(piece, end="", flush=True)
    speed = count / (time.perf_counter() - began)
    if args.json:
        facts = {"prompt": prompt, "text": "".join(pieces), "tokens": count, "tokens_per_second": speed}
        print(json.dumps({**facts, "source": str(opened.source)}))
        return
    print()
    if sys.stdout.isatty():
        say_aside(f"{count} tokens · {speed:.1f} tok/s")
