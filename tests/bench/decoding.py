"""Greedy decoding of a small model after a long prompt: both trainers beside ``transformers``, in one run.

Each side is a process that stays up, on the same cores, with the same model folder and the same prompt; they take
turns. What is timed is from a call's first new token to its last, so that reading the prompt is not in it. All must
write the same tokens.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from bench_process import Worker
from bench_report import run as run_report
from bench_result import add_output, hardware, load, spread
from rich.console import Console

from lwm_core.errors import LwmError, UsageError
from lwm_core.model import ModelConfig, canonical_shapes, preset
from lwm_core.rope import RopeSpec
from lwm_core.vocab import Vocabulary
from lwm_core.weights import write_model_folder

HERE = Path(__file__).parent
RESULT = HERE.parents[1] / "docs" / "benchmarks" / "decoding.json"
SIDES = ("jax", "torch", "transformers")
CACHES = (None, "static")
"""Of transformers: its default cache, which grows, and one of a fixed size; the faster one is its side."""


@dataclass(frozen=True)
class Case:
    """What is measured."""

    context: int = 4096
    tokens: int = 128
    rounds: int = 7
    cores: int = 2
    preset: str = "tiny"
    num_kv_heads: int = 2
    vocabulary: int = 4096


SMOKE = Case(context=64, tokens=8, rounds=1, preset="debug")


def choose_case(given: argparse.Namespace) -> Case:
    """The case of a command line; raises UsageError where a value is none, before anything runs."""
    values: dict[str, Any] = dict(vars(SMOKE if given.smoke else Case()))
    for name in ("rounds", "cores"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise UsageError(f"decoding: --{name} {value}; expected 1 or more")
        values[name] = value or values[name]
    return Case(**values)


def model_of(case: Case) -> ModelConfig:
    """Its shape."""
    return preset(case.preset, Vocabulary(case.vocabulary), num_kv_heads=case.num_kv_heads)


def write_model(case: Case, folder: Path, seed: int = 0) -> None:
    """Random parameters, large enough that what is written varies."""
    config, random = model_of(case), np.random.default_rng(seed)
    arrays = (
        (name, np.ones(shape, np.float32) if name.endswith("norm.weight")
         else (random.standard_normal(shape) * 0.06).astype(np.float32))
        for name, shape in canonical_shapes(config).items()
    )  # fmt: skip
    write_model_folder(folder, config, RopeSpec(10_000.0), 2 * case.context, arrays)


def agreed(replies: dict[str, dict[str, Any]]) -> list[int]:
    """The tokens, if all sides wrote the same.

    Raises:
        LwmError: they did not, so that there is nothing to compare.
    """
    tokens: list[int] = replies[SIDES[0]]["tokens"]
    for side in SIDES[1:]:
        if replies[side]["tokens"] != tokens:
            at = next(n for n, (a, b) in enumerate(zip(tokens, replies[side]["tokens"], strict=True)) if a != b)
            raise LwmError(f"decoding: {side} wrote another token than {SIDES[0]}, the {at}th; nothing to compare")
    return tokens


def rate(reply: dict[str, Any]) -> float:
    """Tokens a second after the first."""
    seconds = reply["seconds"]
    return float((len(seconds) - 1) / (seconds[-1] - seconds[0]))


def run_rounds(workers: dict[str, Worker], case: Case, cache: str | None, console: Console) -> Iterator[dict[str, Any]]:
    """Tokens a second of each side in each round; who goes first changes."""
    for number in range(case.rounds):
        turn = number % len(SIDES)
        replies = {}
        for side in (*SIDES[turn:], *SIDES[:turn]):
            more = {"cache": cache} if side == "transformers" else {}
            replies[side] = workers[side].ask("write", tokens=case.tokens, **more)
        agreed(replies)
        row = {side: rate(replies[side]) for side in SIDES}
        told = ", ".join(f"{side} {row[side] / row['transformers']:.2f}×" for side in SIDES[:2])
        console.print(f"[dim]round {number + 1} of {case.rounds}: {told}[/dim]", highlight=False)
        yield row


def summarise(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Rates, and ratios to transformers within a round."""
    return {
        "tokens_per_second": {side: spread([row[side] for row in rounds]) for side in SIDES},
        "ratio_to_transformers": {
            side: spread([row[side] / row["transformers"] for row in rounds]) for side in SIDES[:2]
        },
    }


def measure(case: Case, console: Console) -> dict[str, Any]:
    """Start all, find the peer's faster cache, time them; the result as it is written."""
    machine = {**hardware(), "load_before": load()}
    with tempfile.TemporaryDirectory(prefix="decoding-") as name, ExitStack() as stack:
        model = Path(name) / "model"
        write_model(case, model)
        about = {"folder": name, "cores": case.cores, "context": case.context}
        workers = {
            side: stack.enter_context(
                Worker(side, sys.executable, HERE / "decoding_worker.py", {**about, "model": str(model), "side": side})
            )
            for side in SIDES
        }
        versions = {side: worker.ask("about")["versions"] for side, worker in workers.items()}
        for worker in workers.values():  # whatever is compiled, is compiled now
            worker.ask("write", tokens=case.tokens)
        peer = workers["transformers"]
        swept = {
            str(cache): max(rate(peer.ask("write", tokens=case.tokens, cache=cache)) for _ in range(2))
            for cache in CACHES
        }
        best = max(CACHES, key=lambda cache: swept[str(cache)])
        rounds = list(run_rounds(workers, case, best, console))
    return {
        "benchmark": "decoding",
        "smoke": case.context == SMOKE.context,
        "date": date.today().isoformat(),
        "hardware": {**machine, "load_after": load()},
        "versions": versions,
        "case": {**asdict(case), "dtype": "float32"},
        "peer_cache": str(best),
        "peer_sweep_tokens_per_second": swept,
        "rounds": rounds,
        "summary": summarise(rounds),
    }


def _told(numbers: dict[str, float], digits: int, unit: str = "") -> str:
    middle, low, high = (f"{numbers[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"{middle}{unit} ({low} to {high})"


def table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows, for people and for the page."""
    versions, summary = result["versions"], result["summary"]
    names = {
        "jax": f"trainer jax (lwm-jax-ring {versions['jax']['lwm-jax-ring']})",
        "torch": f"trainer torch (lwm-torch-ring {versions['torch']['lwm-torch-ring']})",
        "transformers": f"transformers {versions['transformers']['transformers']}",
    }
    rows = []
    for side, name in names.items():
        ratio = summary["ratio_to_transformers"].get(side)
        rows.append([name, _told(summary["tokens_per_second"][side], 1), _told(ratio, 2, "×") if ratio else ""])
    return ["greedy decoding", "tokens/s", "times transformers, same round"], rows


def footnote(result: dict[str, Any]) -> str:
    """What it takes to read the table."""
    machine, case, versions = result["hardware"], result["case"], result["versions"]
    grown = {"None": "its default cache", "static": "its static cache"}[result["peer_cache"]]
    return (
        f"Median (least to greatest) of {len(result['rounds'])} rounds, {result['date']}. Preset {case['preset']}, "
        f"{case['num_kv_heads']} key-value heads, vocabulary {case['vocabulary']}, float32; {case['tokens']} tokens "
        f"after a prompt of {case['context']}; one row. {machine['cpu']}, {case['cores']} cores, {machine['system']}, "
        f"load {machine['load_before']} before; jax {versions['jax']['jax']}, torch {versions['torch']['torch']}; "
        f"transformers with {grown}, the faster of two."
    )


def main(arguments: list[str]) -> int:
    """Measure, show, and write where it was asked for; the exit code."""
    parser = argparse.ArgumentParser(prog="nox -s bench -- decoding", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, help=f"rounds after the warm-up (default {Case().rounds})")
    parser.add_argument("--cores", type=int, help=f"cores of each side (default {Case().cores})")
    add_output(parser, RESULT)
    given = parser.parse_args(arguments)
    return run_report(
        Path(__file__), arguments, given, RESULT, lambda console: measure(choose_case(given), console), table, footnote
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
