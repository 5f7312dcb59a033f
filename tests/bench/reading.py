"""What reading a long text takes: memory and time by length, of both trainers, with a cache and without.

Every figure is of a process of its own, so that the most memory it held is that of this one length.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench_report import run as run_report
from bench_result import add_output, hardware, load
from rich.console import Console

from lwm_core.errors import LwmError, UsageError

HERE = Path(__file__).parent
RESULT = HERE.parents[1] / "docs" / "benchmarks" / "reading.json"
PARTS = ("jax-prefill", "jax-score", "torch-prefill", "torch-score")


@dataclass(frozen=True)
class Case:
    """What is measured."""

    lengths: tuple[int, ...] = (16_384, 32_768, 65_536, 131_072)


SMOKE = Case((1024,))


def choose_case(given: argparse.Namespace) -> Case:
    """The case of a command line; raises UsageError where a value is none, before anything runs."""
    case = SMOKE if given.smoke else Case()
    if given.lengths is None:
        return case
    try:
        lengths = tuple(int(word) for word in given.lengths.split(","))
    except ValueError:
        lengths = ()
    if not lengths or min(lengths) < 2:
        raise UsageError(f"reading: --lengths {given.lengths}; expected numbers of tokens from 2 on, like 16384,65536")
    return Case(lengths)


def run(side: str, task: str, tokens: int) -> dict[str, Any]:
    """One measurement.

    Raises:
        LwmError: the process failed; its last words are in the message, all of them in ``details``.
    """
    words = [sys.executable, str(HERE / "reading_worker.py"), side, task, str(tokens)]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    env.pop("XLA_FLAGS", None)  # tests have some with which a long computation takes longer
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise LwmError(f"reading: {side}, {task} of {tokens} tokens failed: {last}", details=done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(case: Case, only: str | None, console: Console) -> Iterator[dict[str, Any]]:
    """A row for each side, task and length; of one side and task where ``only`` names them."""
    for name in PARTS if only is None else (only,):
        side, task = name.split("-")
        for tokens in case.lengths:
            found = run(side, task, tokens)
            grown = (found["most"] - found["before"]) / tokens
            console.print(
                f"[dim]{side}, {task}, {tokens:,} tokens: {found['most'] / 1e9:.2f} GB at most, "
                f"{grown / 1e3:.1f} KB a token, {found['seconds']:.0f} s[/dim]", highlight=False,
            )  # fmt: skip
            yield {"side": side, "task": task, "tokens": tokens, **found}


def measure(case: Case, only: str | None, console: Console) -> dict[str, Any]:
    """The result as it is written; what ``only`` leaves out is as it was kept."""
    machine = {**hardware(), "load_before": load()}
    rows = list(measured(case, only, console))
    if only is not None:
        old = json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if RESULT.exists() else []
        rows += [row for row in old if f"{row['side']}-{row['task']}" != only]
        rows.sort(key=lambda row: PARTS.index(f"{row['side']}-{row['task']}"))
    return {
        "benchmark": "reading",
        "smoke": case == SMOKE,
        "date": date.today().isoformat(),
        "hardware": {**machine, "load_after": load()},
        "versions": {name: version(name) for name in ("lwm-jax-ring", "lwm-torch-ring", "jax", "torch")},
        "case": asdict(case),
        "rows": rows,
    }


def table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows, for people and for the page."""
    names = {"prefill": "prefill", "score": "score, no cache"}
    rows = [
        [
            f"{row['side']}, {names[row['task']]}", f"{row['tokens']:,}", f"{row['most'] / 1e9:.2f}",
            f"{(row['most'] - row['before']) / row['tokens'] / 1e3:.1f}", f"{row['seconds']:.0f}",
        ]
        for row in result["rows"]
    ]  # fmt: skip
    return ["trainer, task", "tokens", "GB at most", "KB a token", "seconds"], rows


def footnote(result: dict[str, Any]) -> str:
    """What it takes to read the table."""
    machine, versions = result["hardware"], result["versions"]
    return (
        f"{result['date']}, {machine['cpu']}, {machine['cores']} cores, {machine['system']}, load "
        f"{machine['load_before']} before; jax {versions['jax']}, torch {versions['torch']}. Preset tiny, 2 key-value "
        "heads, vocabulary 4096, float32, one device. KB a token: what the process grew by, over the tokens."
    )


def main(arguments: list[str]) -> int:
    """Measure, show, and write where it was asked for; the exit code."""
    parser = argparse.ArgumentParser(prog="nox -s bench -- reading", description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", metavar="N,N", help="numbers of tokens (16384 to 131072, each twice the last)")
    parser.add_argument("--only", choices=PARTS, help="measure this anew, and keep the other figures as they are")
    add_output(parser, RESULT)
    given = parser.parse_args(arguments)
    return run_report(
        Path(__file__),
        arguments,
        given,
        RESULT,
        lambda console: measure(choose_case(given), given.only, console),
        table,
        footnote,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
