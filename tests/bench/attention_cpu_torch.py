"""``nox -s bench -- attention-cpu-torch``: ``torch-ring`` on two gloo ranks, between a ceiling and a peer, on a CPU.

The ceiling is one process with as many threads that runs torch's ``scaled_dot_product_attention`` over everything; the
peer is PyPI's ``ring-attention-pytorch``. All processes stay up and take turns; a round times all three, so that a
ratio compares what ran within the same seconds. How to read the figures: ``docs/benchmarks/attention-cpu-torch.md``.

Shapes: B batch, S sequence, H heads, D head dim; float32.
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
from bench_report import run as run_report
from bench_result import add_output, hardware, load, spread
from bench_torch_ranks import Ranks
from rich.console import Console

from lwm_core.errors import LwmError, UsageError

HERE = Path(__file__).parent
RESULT = HERE.parents[1] / "docs" / "benchmarks" / "attention-cpu-torch.json"
KINDS = ("forward", "forward+backward")
SIDES = ("ours", "ceiling", "peer")
BACKWARD_FACTOR = 3.5
"""Forward+backward over forward: 2 matrix products forward, 5 backward (the scores are computed again)."""
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """What is timed, and how often; B is 1. The peer's buckets are swept over ``sweep_len`` tokens."""

    seq_len: int = 16_384
    heads: int = 8
    head_dim: int = 64
    world: int = 2
    peer_buckets: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    sweep_len: int = 4096
    sweeps: int = 2
    rounds: int = 7

    def flops(self) -> dict[str, float]:
        """Causal operations: half of the two products ``[S,D]x[D,S]`` and ``[S,S]x[S,D]`` a head."""
        forward = 4.0 * self.heads * self.seq_len**2 * self.head_dim / 2
        return {"forward": forward, "forward+backward": BACKWARD_FACTOR * forward}


SMOKE = Case(seq_len=256, heads=2, head_dim=16, peer_buckets=(32, 64), sweep_len=128, sweeps=1, rounds=1)


def choose_case(given: argparse.Namespace) -> Case:
    """The case of a command line; raises UsageError where a value is none, before anything runs."""
    values: dict[str, Any] = dict(vars(SMOKE if given.smoke else Case()))
    if given.rounds is not None:
        if given.rounds < 1:
            raise UsageError(f"attention-cpu-torch: --rounds {given.rounds}; expected 1 or more")
        values["rounds"] = given.rounds
    return Case(**values)


def save_inputs(case: Case, folder: Path, seed: int = 0) -> None:
    """q, k, v and the cotangent dout ``[1,S,H,D]``, standard normal, float32, natural order, for all to load."""
    generator = np.random.default_rng(seed)
    for name in ("q", "k", "v", "dout"):
        shape = (1, case.seq_len, case.heads, case.head_dim)
        np.save(folder / f"{name}.npy", generator.standard_normal(shape, dtype=np.float32))


def sweep(peer: Ranks, case: Case, console: Console) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The peer's fastest way for each kind by its best time, and what was measured for that."""
    ways = [{"bucket_size": size, "striped": striped} for striped in (True, False) for size in case.peer_buckets]
    rows: list[dict[str, Any]] = []
    for how in ways:
        if case.sweep_len // case.world % how["bucket_size"]:
            continue
        console.print(f"[dim]peer, {told_way(how)}[/dim]")
        rows.append({"how": how})
        for kind in KINDS:
            asked = {"kind": kind, "how": how, "tokens": case.sweep_len}
            rows[-1][kind] = [peer.seconds(**asked) for _ in range(case.sweeps)]
    return {kind: min(rows, key=lambda row: min(row[kind]))["how"] for kind in KINDS}, rows


def told_way(how: dict[str, Any]) -> str:
    """The peer's way in words."""
    return f"buckets of {how['bucket_size']}, {'striped' if how['striped'] else 'not striped'}"


def gathered(replies: list[dict[str, Any]], result: str, folder: Path) -> np.ndarray:
    """``[1,S,H,D]`` float64 in natural order, of what each rank has saved."""
    parts = [(np.load(folder / reply["places"]), np.load(folder / reply["files"][result])) for reply in replies]
    places = np.concatenate([place for place, _ in parts])
    whole = np.concatenate([part for _, part in parts], axis=1).astype(np.float64)
    return whole[:, np.argsort(places)]


def compare(sides: dict[str, Ranks], best: dict[str, Any], folder: Path) -> dict[str, float]:
    """Relative L2 distance of each to the ceiling, for the very programs that will be timed.

    Raises:
        LwmError: they do not compute the same thing.
    """
    distances: dict[str, float] = {}
    for kind in KINDS:
        saved = {
            name: side.ask("save", kind=kind, name=name, how=best[kind] if name == "peer" else None)
            for name, side in sides.items()
        }
        for result in saved["ceiling"][0]["files"]:
            expected = gathered(saved["ceiling"], result, folder)
            for name in ("ours", "peer"):
                error = np.linalg.norm(gathered(saved[name], result, folder) - expected) / np.linalg.norm(expected)
                distances[f"{name} {kind} {result}"] = float(error)
    worst = max(distances, key=lambda name: (not distances[name] < TOLERANCE, distances[name]))
    if not distances[worst] < TOLERANCE:  # so that NaN fails too
        raise LwmError(
            f"attention-cpu-torch: {worst} is {distances[worst]:.2e} (relative L2) from one call over everything; "
            f"expected less than {TOLERANCE:.0e}, so there is nothing to compare"
        )
    return distances


def run_rounds(
    sides: dict[str, Ranks], case: Case, best: dict[str, Any], console: Console
) -> Iterator[dict[str, dict[str, float]]]:
    """Seconds of each round. Who goes first changes, so that a drift of the machine favours none."""
    for number in range(case.rounds):
        turn = number % len(SIDES)
        row: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
        for kind in KINDS:
            for name in (*SIDES[turn:], *SIDES[:turn]):
                row[kind][name] = sides[name].seconds(kind=kind, how=best[kind] if name == "peer" else None)
        told = ", ".join(
            f"{kind} {row[kind]['ceiling'] / row[kind]['ours']:.2f} of the ceiling and "
            f"{row[kind]['peer'] / row[kind]['ours']:.2f}× the peer"
            for kind in KINDS
        )
        console.print(f"[dim]round {number + 1} of {case.rounds}: {told}[/dim]", highlight=False)
        yield row


def summarise(rounds: list[dict[str, dict[str, float]]], flops: dict[str, float]) -> dict[str, Any]:
    """Rates in GFLOP/s, and ratios that compare only what was timed in the same round; and of the least times."""
    summary: dict[str, Any] = {}
    for kind, count in flops.items():
        times = {side: [row[kind][side] for row in rounds] for side in SIDES}
        summary[kind] = {f"{side}_gflops": spread([count / each / 1e9 for each in times[side]]) for side in SIDES}
        for side in ("ceiling", "peer"):
            ratios = spread([b / a for a, b in zip(times["ours"], times[side], strict=True)])
            summary[kind][f"ratio_to_{side}"] = {**ratios, "of_least": min(times[side]) / min(times["ours"])}
    return summary


def measure(case: Case, console: Console) -> dict[str, Any]:
    """Start all, check that they agree, time them; the result as it is written."""
    machine = {**hardware(), "load_before": load()}
    with tempfile.TemporaryDirectory(prefix="attention-cpu-torch-") as name, ExitStack() as stack:
        folder = Path(name)
        save_inputs(case, folder)
        sides = {}
        for side in SIDES:
            script = HERE / f"attention_cpu_torch_{side}.py"
            world, threads = (1, case.world) if side == "ceiling" else (case.world, 1)
            request = {"folder": name, "seq_len": case.seq_len}
            sides[side] = stack.enter_context(Ranks(side, sys.executable, script, request, world, threads))
        about = {side: ranks.ask("about")[0] for side, ranks in sides.items()}
        best, swept = sweep(sides["peer"], case, console)
        agreement = compare(sides, best, folder)
        rounds = list(run_rounds(sides, case, best, console))
    return {
        "benchmark": "attention-cpu-torch",
        "smoke": case.seq_len == SMOKE.seq_len,
        "date": date.today().isoformat(),
        "hardware": {**machine, "load_after": load()},
        "versions": {side: told["versions"] for side, told in about.items()},
        "case": {**asdict(case), "dtype": "float32", "mask": "causal", "strategy": "ring", "layout": "zigzag",
                 "flops": case.flops()},
        "peer_best": best,
        "peer_sweep_seconds": swept,
        "agreement": agreement,
        "rounds": rounds,
        "summary": summarise(rounds, case.flops()),
    }  # fmt: skip


def _told(numbers: dict[str, float], digits: int, unit: str = "") -> str:
    middle, low, high = (f"{numbers[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"{middle}{unit} ({low} to {high})"


def table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows, for people and for the page."""
    case, versions = result["case"], result["versions"]
    names = {
        "ours": f"torch-ring {versions['ours']['lwm-torch-ring']}, {case['world']} ranks",
        "ceiling": f"scaled_dot_product_attention, {case['world']} threads",
        "peer": f"ring-attention-pytorch {versions['peer']['ring-attention-pytorch']}, {case['world']} ranks",
    }
    summary = result["summary"]
    rows = [[name, *(_told(summary[kind][f"{side}_gflops"], 1) for kind in KINDS)] for side, name in names.items()]
    for side, label, unit in (("ceiling", "share of the ceiling", ""), ("peer", "times the peer", "×")):
        key = f"ratio_to_{side}"
        rows.append([f"**{label}**", *(f"**{_told(summary[kind][key], 2, unit)}**" for kind in KINDS)])
        rows.append([f"{label}, least times", *(f"{summary[kind][key]['of_least']:.2f}{unit}" for kind in KINDS)])
    return ["GFLOP/s, causal flops", *KINDS], rows


def footnote(result: dict[str, Any]) -> str:
    """What it takes to read the table."""
    machine, versions, case = result["hardware"], result["versions"], result["case"]
    ways = ", ".join(f"{kind}: {told_way(result['peer_best'][kind])}" for kind in KINDS)
    return (
        f"Median (least to greatest) of {len(result['rounds'])} rounds, {result['date']}. B=1, S={case['seq_len']}, "
        f"H={case['heads']}, D={case['head_dim']}, float32, causal. {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['system']}, load {machine['load_before']} before and {machine['load_after']} after; Python "
        f"{versions['ours']['python']}, torch {versions['ours']['torch']}. The peer by a sweep: {ways}. Results are at "
        f"most {max(result['agreement'].values()):.1e} (relative L2) from the ceiling's."
    )


def main(arguments: list[str]) -> int:
    """Measure, show, and write where it was asked for; the exit code."""
    parser = argparse.ArgumentParser(prog="nox -s bench -- attention-cpu-torch", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, help=f"rounds after the warm-up (default {Case().rounds})")
    add_output(parser, RESULT)
    given = parser.parse_args(arguments)
    return run_report(
        Path(__file__), arguments, given, RESULT, lambda console: measure(choose_case(given), console), table, footnote
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
