"""``lwm score RUN FILE``: how well a run's model predicts a long text in one context."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lwm_core.cli.overrides import add_overrides

if TYPE_CHECKING:
    from lwm_core.run import Model, Reopened
    from lwm_evals.score import Score


def add_score(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``lwm score``."""
    parser = subparsers.add_parser(
        "score", help="how well a run's model predicts a long text",
        description="Read a text in one context, without a cache, and tell the perplexity by position.",
    )  # fmt: skip
    parser.add_argument("folder", metavar="RUN", type=Path, help="the run's folder")
    parser.add_argument("file", metavar="FILE", help="the text, UTF-8; - reads standard input")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="the text's first N tokens alone (all)")
    parser.add_argument("--plot", type=Path, metavar="SVG", help="draw the perplexity by position into this file")
    parser.add_argument(
        "--json", action="store_true",
        help="print {tokens, perplexity, nats, bits_per_byte, seconds, tokens_per_second, trained, bands, source}",
    )  # fmt: skip
    add_overrides(parser)
    parser.set_defaults(run=run_score)


def run_score(args: argparse.Namespace) -> int:
    """Load the model, read the text, tell; of several processes the first tells."""
    from lwm_core.errors import UsageError
    from lwm_core.run import lead, reopen

    if args.max_tokens is not None and args.max_tokens < 2:
        raise UsageError(f"--max-tokens is {args.max_tokens}; expected at least 2")
    if args.plot is not None and args.plot.suffix != ".svg":
        raise UsageError(f"--plot {args.plot}: expected a name that ends with .svg")
    text = _read(args.file)
    opened = reopen(args.folder, args.overrides)
    lead(opened.trainer, lambda model: _tell(args, opened, model, text))
    return 0


def _read(name: str) -> str:
    from lwm_core.errors import DataError

    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 at byte {error.start}; convert it first") from None


def _tell(args: argparse.Namespace, opened: Reopened, model: Model, text: str) -> None:
    import json
    import time

    from lwm_core.errors import DataError
    from lwm_evals.figures import perplexity_by_position, standalone
    from lwm_evals.files import write_atomically
    from lwm_evals.score import score

    tokenizer = opened.pipeline.tokenizer
    ids = tokenizer.encode(text)
    if args.max_tokens is not None and len(ids) > args.max_tokens:
        ids = ids[: args.max_tokens]
        text = tokenizer.decode(ids)
    if len(ids) < 2:
        raise DataError(f"{args.file}: {len(ids)} tokens; expected at least 2, for the first is not predicted")
    began = time.perf_counter()
    likelihoods = model.scorer().log_likelihood(ids)
    seconds = time.perf_counter() - began
    found = score(likelihoods, len(text.encode()))
    trained = opened.stage.seq_len
    if args.plot is not None:
        write_atomically(args.plot, standalone(perplexity_by_position(found, trained)))
    if args.json:
        print(json.dumps(_facts(found, seconds, trained, str(opened.source))))
        return
    print(_table(found, seconds, trained, str(opened.source)), end="")
    if args.plot is not None:
        print(f"drawn: {args.plot}")


def _facts(found: Score, seconds: float, trained: int, source: str) -> dict[str, Any]:
    bands = [
        {"start": band.start, "stop": band.stop, "nats": band.nats, "perplexity": band.perplexity}
        for band in found.bands
    ]
    return {
        "tokens": found.tokens, "perplexity": found.perplexity, "nats": found.nats,
        "bits_per_byte": found.bits_per_byte, "seconds": seconds, "tokens_per_second": found.tokens / seconds,
        "trained": trained, "bands": bands, "source": source,
    }  # fmt: skip


def _table(found: Score, seconds: float, trained: int, source: str) -> str:
    from lwm_evals.score import table

    rows = table(found)
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = [f"{'position':>{widths[0]}}  {'perplexity':>{max(10, widths[1])}}"]
    lines += [f"{where:>{widths[0]}}  {value:>{max(10, widths[1])}}  {bar}" for where, value, bar in rows]
    speed = f"{found.tokens / seconds:,.0f} tokens/s"
    beyond = "" if found.tokens <= trained else f"; it was trained on {trained:,}"
    lines.append(
        f"{found.tokens:,} tokens in one context, perplexity {found.perplexity:.3f}, "
        f"{found.bits_per_byte:.3f} bits a byte ({speed}); {source}{beyond}"
    )
    return "\n".join(lines) + "\n"
