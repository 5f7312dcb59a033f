"""``nox -s bench -- attention-cpu``: the ring attention of ``jax-ring`` beside PyPI's ``ringattention`` on a CPU.

Two worker processes stay up, one for each, and take turns; a round times both and the machine's own matrix product, so
that a ratio compares what ran within the same seconds. How to read the figures: ``docs/benchmarks/attention-cpu.md``.

Shapes: B batch, S sequence, H heads, D head dim; float32.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from bench_process import Worker
from bench_result import PEERS, add_output, hardware, load, output_target, show, summarise
from rich.console import Console

from lwm_core.errors import LwmError, UsageError

HERE = Path(__file__).parent
RESULT = HERE.parents[1] / "docs" / "benchmarks" / "attention-cpu.json"
KINDS = ("forward", "forward+backward")
BACKWARD_FACTOR = 3.5
"""Forward+backward over forward: 2 matrix products forward, 5 backward (the scores are computed again)."""
TOLERANCE = 1e-4

Chunks = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """What is timed, and how often; B is 1. ``peer_default`` are the chunks that LWM's configuration gives the peer."""

    seq_len: int = 8192
    heads: int = 8
    head_dim: int = 64
    world: int = 4
    matmul: int = 2048
    peer_default: Chunks = (1024, 1024)
    peer_chunks: tuple[Chunks, ...] = ((128, 128), (256, 256), (256, 512), (512, 256), (512, 512), (1024, 1024))
    sweeps: int = 2
    rounds: int = 7

    def flops(self) -> dict[str, float]:
        """Causal operations: half of the two products ``[S,D]x[D,S]`` and ``[S,S]x[S,D]`` a head."""
        forward = 4.0 * self.heads * self.seq_len**2 * self.head_dim / 2
        return {"forward": forward, "forward+backward": BACKWARD_FACTOR * forward}


SMOKE = Case(seq_len=256, heads=2, head_dim=16, matmul=128, peer_default=(64, 64), peer_chunks=((32, 32), (64, 64)),
             sweeps=1, rounds=1)  # fmt: skip


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; ``--peer-python`` is nox's to give."""
    parser = argparse.ArgumentParser(prog="nox -s bench -- attention-cpu", description=__doc__.split("\n")[0])
    parser.add_argument("--peer-python", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, help=f"rounds after the warm-up (default {Case().rounds})")
    parser.add_argument(
        "--peer-chunks", metavar="QxK,...", help="chunk sizes of the peer to sweep instead of the usual"
    )
    add_output(parser, RESULT)
    return parser.parse_args(arguments)


def choose_case(given: argparse.Namespace) -> Case:
    """The case of a command line.

    Raises:
        UsageError: a value is none; told before anything runs.
    """
    values: dict[str, Any] = dict(vars(SMOKE if given.smoke else Case()))
    if given.rounds is not None:
        if given.rounds < 1:
            raise UsageError(f"attention-cpu: --rounds {given.rounds}; expected 1 or more")
        values["rounds"] = given.rounds
    if given.peer_chunks is not None:
        values["peer_chunks"] = read_chunks(given.peer_chunks, values["seq_len"] // values["world"])
    return Case(**values)


def read_chunks(text: str, local: int) -> tuple[Chunks, ...]:
    """``128x512,256x256`` as pairs; each must divide the ``local`` tokens of a device."""
    pairs = []
    for word in text.split(","):
        sizes = [int(size) if size.isdecimal() else 0 for size in word.split("x")]
        if len(sizes) != 2 or any(size < 1 or local % size for size in sizes):
            raise UsageError(
                f"attention-cpu: --peer-chunks {word!r}; expected QxK such as 256x512, both dividing {local} tokens"
            )
        pairs.append((sizes[0], sizes[1]))
    return tuple(pairs)


def save_inputs(case: Case, folder: Path, seed: int = 0) -> None:
    """q, k, v and the cotangent dout ``[1,S,H,D]``, standard normal, float32, for both workers to load."""
    generator = np.random.default_rng(seed)
    for name in ("q", "k", "v", "dout"):
        shape = (1, case.seq_len, case.heads, case.head_dim)
        np.save(folder / f"{name}.npy", generator.standard_normal(shape, dtype=np.float32))


def sweep(peer: Worker, case: Case, console: Console) -> tuple[dict[str, Chunks], list[dict[str, Any]]]:
    """The peer's fastest chunks for each kind by its best time, and what was measured for that."""
    rows: list[dict[str, Any]] = [{"chunks": chunks, **{kind: [] for kind in KINDS}} for chunks in case.peer_chunks]
    for turn in range(case.sweeps):
        for row in rows:
            console.print(f"[dim]peer, chunks {row['chunks'][0]}×{row['chunks'][1]}, sweep {turn + 1}[/dim]")
            for kind in KINDS:
                row[kind].append(peer.ask("time", kind=kind, chunks=row["chunks"])["seconds"])
    best = {kind: min(rows, key=lambda row: min(row[kind]))["chunks"] for kind in KINDS}
    return best, rows


def compare(ours: Worker, peer: Worker, best: dict[str, Chunks], folder: Path) -> dict[str, float]:
    """Relative L2 distance of ours to the peer's, for the very programs that will be timed.

    Raises:
        LwmError: they do not compute the same thing.
    """
    distances: dict[str, float] = {}
    for kind in KINDS:
        mine = ours.ask("save", kind=kind, name="ours")["files"]
        theirs = peer.ask("save", kind=kind, name="peer", chunks=best[kind])["files"]
        for a, b in zip(mine, theirs, strict=True):
            result = a.removeprefix("ours-").removesuffix(".npy")
            x, y = np.load(folder / a).astype(np.float64), np.load(folder / b).astype(np.float64)
            distances[f"{kind} {result}"] = float(np.linalg.norm(x - y) / np.linalg.norm(y))
    worst = max(distances, key=lambda name: (not distances[name] < TOLERANCE, distances[name]))
    if not distances[worst] < TOLERANCE:  # so that NaN fails too
        raise LwmError(
            f"attention-cpu: the two differ in {worst} by {distances[worst]:.2e} (relative L2); expected less than "
            f"{TOLERANCE:.0e}, so there is nothing to compare"
        )
    return distances


def run_rounds(
    ours: Worker, peer: Worker, case: Case, best: dict[str, Chunks], console: Console
) -> Iterator[dict[str, Any]]:
    """Seconds of each round. Who goes first alternates, so that a drift of the machine favours neither."""
    for kind in KINDS:  # compiles and warms what is not warm yet
        ours.ask("time", kind=kind)
        for chunks in (best[kind], case.peer_default):
            peer.ask("time", kind=kind, chunks=chunks)
    for number in range(case.rounds):
        row: dict[str, Any] = {}
        for kind in KINDS:
            turns = [("ours", ours, None), ("peer", peer, best[kind]), ("peer_default", peer, case.peer_default)]
            row[kind] = {
                name: worker.ask("time", kind=kind, chunks=chunks)["seconds"]
                for name, worker, chunks in (turns if number % 2 == 0 else turns[::-1])
            }
        row["matmul"] = ours.ask("matmul", size=case.matmul, repeats=5)["seconds"]
        ratios = {kind: [row[kind][side] / row[kind]["ours"] for side in PEERS] for kind in KINDS}
        told = ", ".join(f"{kind} " + " and ".join(f"{ratio:.2f}×" for ratio in ratios[kind]) for kind in KINDS)
        console.print(f"[dim]round {number + 1} of {case.rounds}: {told}[/dim]", highlight=False)
        yield row


def measure(case: Case, peer_python: str, console: Console) -> dict[str, Any]:
    """Start both workers, check that they agree, time them; the result as it is written."""
    machine = {**hardware(), "load_before": load()}
    with tempfile.TemporaryDirectory(prefix="attention-cpu-") as name:
        folder = Path(name)
        save_inputs(case, folder)
        request = {"folder": name, "seq_len": case.seq_len, "world": case.world}
        with (
            Worker("ours", sys.executable, HERE / "attention_cpu_ours.py", request) as ours,
            Worker("peer", peer_python, HERE / "attention_cpu_peer.py", request) as peer,
        ):
            about = {"ours": ours.ask("about"), "peer": peer.ask("about")}
            best, swept = sweep(peer, case, console)
            agreement = compare(ours, peer, best, folder)
            rounds = list(run_rounds(ours, peer, case, best, console))
    return {
        "benchmark": "attention-cpu",
        "smoke": case.seq_len == SMOKE.seq_len,
        "date": date.today().isoformat(),
        "hardware": {**machine, "load_after": load()},
        "versions": {side: told["versions"] for side, told in about.items()},
        "case": {
            "B": 1, "S": case.seq_len, "H": case.heads, "D": case.head_dim, "dtype": "float32", "mask": "causal",
            "world": case.world, "layout": "zigzag", "chunks": about["ours"]["chunks"], "matmul": case.matmul,
            "flops": case.flops(),
        },
        "peer_chunks": {kind: {"peer": best[kind], "peer_default": case.peer_default} for kind in KINDS},
        "peer_sweep_seconds": swept,
        "agreement": agreement,
        "rounds": rounds,
        "summary": summarise(rounds, case.flops(), 2.0 * case.matmul**3),
    }  # fmt: skip


def main(arguments: list[str]) -> int:
    """Measure, show, and write where it was asked for; the exit code."""
    given, console = parse(arguments), Console()
    at = arguments.index("--peer-python")
    command = shlex.join(["nox", "-s", "bench", "--", "attention-cpu", *arguments[:at], *arguments[at + 2 :]])
    try:
        target = output_target(given, RESULT)
        result = {**measure(choose_case(given), given.peer_python, console), "command": command}
    except LwmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    show(result, console)
    if target is not None:
        target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        console.print(f"Written to {target}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
