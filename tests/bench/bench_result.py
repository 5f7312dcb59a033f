"""What a benchmark reports: the machine, rates, ratios of the same round, and the table."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from lwm_core.errors import UsageError

PEERS = {"peer": "swept chunks", "peer_default": "LWM's chunks"}
"""The peer's sides of a round, and how tables call them."""

BUSY = 1.0
"""A load average before the run above which its figures are doubtful."""


def hardware() -> dict[str, Any]:
    """The processor's name, the cores this process may use, and the operating system."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": cores,
        "system": f"{platform.system()} {platform.machine()}",
    }


def load() -> float | None:
    """How many processes wanted a core in the last minute; None where the system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def add_output(parser: argparse.ArgumentParser, result: Path) -> None:
    """The options ``--smoke``, ``--write`` (to ``result``) and ``--out``."""
    parser.add_argument("--smoke", action="store_true", help="a tiny case, once: shows that it runs, measures nothing")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--write", action="store_true", help=f"write docs/benchmarks/{result.name}")
    where.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON to FILE")


def output_target(given: argparse.Namespace, result: Path) -> Path | None:
    """The file to write, if any.

    Raises:
        UsageError: the options do not go together, or there is no such folder; told before anything runs.
    """
    if given.smoke and given.write:
        raise UsageError(f"{result.stem}: --smoke measures nothing worth keeping; leave out --write or --smoke")
    target: Path | None = result if given.write else given.out
    if target is not None and not target.parent.is_dir():
        raise UsageError(f"{result.stem}: --out {target}: there is no folder {target.parent}; make it first")
    return target


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarise(rounds: list[dict[str, Any]], flops: dict[str, float], matmul_flops: float) -> dict[str, Any]:
    """Rates in GFLOP/s, and ratios that compare only what was timed in the same round.

    Args:
        rounds: each ``{"matmul": seconds, kind: {"ours": seconds, "peer": seconds, "peer_default": seconds}}``.
        flops: floating-point operations of each kind.
        matmul_flops: those of the matrix product.
    """
    machine = [matmul_flops / row["matmul"] / 1e9 for row in rounds]
    summary: dict[str, Any] = {"matmul_gflops": spread(machine)}
    for kind, count in flops.items():
        ours = [count / row[kind]["ours"] / 1e9 for row in rounds]
        summary[kind] = {
            "ours_gflops": spread(ours),
            "share_of_matmul": spread([a / b for a, b in zip(ours, machine, strict=True)]),
        }
        for side in PEERS:
            theirs = [count / row[kind][side] / 1e9 for row in rounds]
            summary[kind][f"{side}_gflops"] = spread(theirs)
            summary[kind][f"ratio_to_{side}"] = spread([a / b for a, b in zip(ours, theirs, strict=True)])
    return summary


def _told(numbers: dict[str, float], unit: str = "", digits: int = 1) -> str:
    middle, low, high = (f"{numbers[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"{middle}{unit} [dim]({low} to {high})[/dim]"


def show(result: dict[str, Any], console: Console) -> None:
    """The table for people, and under it what it takes to read it."""
    case, summary, kinds = result["case"], result["summary"], list(result["peer_chunks"])
    shape = ", ".join(f"{name}={case[name]}" for name in "BSHD")
    table = Table(
        title=f"{result['benchmark']}: {shape}, {case['dtype']}, {case['mask']}, {case['world']} host devices",
        box=box.SIMPLE_HEAD, title_justify="left", title_style="bold",
    )  # fmt: skip
    table.add_column("GFLOP/s, causal flops")
    for kind in kinds:
        table.add_column(kind, justify="right")
    ours, peer = (result["versions"][side] for side in ("ours", "peer"))
    names = {"ours": f"jax-ring {ours['lwm-jax-ring']}"}
    names |= {side: f"ringattention {peer['ringattention']}, {how}" for side, how in PEERS.items()}
    for side, name in names.items():
        table.add_row(name, *(_told(summary[kind][f"{side}_gflops"]) for kind in kinds))
    for side, how in PEERS.items():
        ratios = (_told(summary[kind][f"ratio_to_{side}"], "×", 2) for kind in kinds)
        table.add_row(f"[bold]ratio in the same round, {how}[/bold]", *(f"[bold]{ratio}[/bold]" for ratio in ratios))
    table.add_row(f"float32 matmul {case['matmul']}³", *(_told(summary["matmul_gflops"]) for _ in kinds))
    table.add_row("jax-ring as a share of it", *(_told(summary[kind]["share_of_matmul"], "", 2) for kind in kinds))
    console.print(table)
    pairs = {kind: [f"{q}×{k}" for q, k in sides.values()] for kind, sides in result["peer_chunks"].items()}
    chunks = ", ".join(f"{kind} {' and '.join(told)}" for kind, told in pairs.items())
    machine, agreement = result["hardware"], max(result["agreement"].values())
    console.print(
        f"Median (least to greatest) of {len(result['rounds'])} rounds. jax-ring: jax {ours['jax']}, {case['layout']}, "
        f"chunks {case['chunks'][0]}×{case['chunks'][1]}. ringattention: jax {peer['jax']}, chunks by a sweep and "
        f"LWM's: {chunks}. Their results differ by at most {agreement:.1e} (relative L2).\n{machine['cpu']}, "
        f"{machine['cores']} cores, load {machine['load_before']} before and {machine['load_after']} after.",
        highlight=False,
    )
    if (machine["load_before"] or 0) > BUSY:
        console.print("[yellow]The machine was busy when this began: measure again on a quiet one.[/yellow]")
    if result["smoke"]:
        console.print("[yellow]--smoke: this shows that the benchmark runs; its figures mean nothing.[/yellow]")
