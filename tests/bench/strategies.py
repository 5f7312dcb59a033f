"""``nox -s bench -- strategies``: every strategy, layout and kind of documents on 8 host devices, in one table.

For each: blocks that a rank computes (most and mean), bytes that a rank sends, and seconds of forward with backward,
which compare strategies on one machine whose devices share its cores. Bytes are those of ``lwm_core.attention_cost``,
which tests hold against the transfers in the traced programs.

Shapes: B batch, S sequence, H query heads, K key-value heads, D head dim; float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_result import add_output, hardware, load, output_target
from jax.sharding import Mesh
from rich import box
from rich.console import Console
from rich.table import Table

from lwm_core.attention import AttentionMask, executed_blocks
from lwm_core.attention_cost import AttentionShape, MachineRates, strategy_cost
from lwm_core.errors import LwmError
from lwm_core.layout import LayoutKind, SequenceLayout
from lwm_core.mesh import MESH_AXES
from lwm_core.protocols import AttentionAxes
from lwm_core.registry import Registry, validate_options
from lwm_jax_ring.devices import ensure_devices

RESULT = Path(__file__).parents[2] / "docs" / "benchmarks" / "strategies.json"
CAUSAL = AttentionMask("causal")
STRATEGIES = ("ring", "allgather", "usp", "ulysses")


@dataclass(frozen=True)
class Case:
    """What is timed, and how often; B is 1, K is H. ``document`` is the mean length of packed documents."""

    seq_len: int = 8192
    heads: int = 8
    head_dim: int = 64
    world: int = 8
    inner: int = 2
    block: int = 256
    document: int = 512
    rounds: int = 3
    layouts: tuple[LayoutKind, ...] = ("contiguous", "zigzag", "striped")


SMOKE = Case(seq_len=512, head_dim=16, block=16, document=64, rounds=1, layouts=("zigzag",))


def packed(case: Case, seed: int = 0) -> np.ndarray:
    """``[S]`` segment ids of documents whose lengths are geometric about ``case.document``."""
    starts = np.random.default_rng(seed).random(case.seq_len) < 1.0 / case.document
    return 1 + np.cumsum(starts).astype(np.int32)


def measure(case: Case, console: Console) -> Iterator[dict[str, Any]]:
    """A row for each strategy, layout and kind of documents."""
    ensure_devices(case.world)
    mesh = Mesh(np.array(jax.devices()[: case.world]).reshape(1, 1, 1, case.world), MESH_AXES)
    registry = Registry.from_environment()
    factory: Any = registry.load("attention", "jax-ring")
    generator = np.random.default_rng(1)
    shape = (1, case.seq_len, case.heads, case.head_dim)
    q, k, v, dout = (jnp.asarray(generator.standard_normal(shape, np.float32)) for _ in range(4))
    for strategy in STRATEGIES:
        inner = {"usp": case.inner, "ulysses": case.world}.get(strategy, 1)
        given = {"strategy": strategy, **({"inner": inner} if strategy == "usp" else {})}
        # With ulysses every device has the whole sequence of some heads.
        for name in case.layouts if strategy != "ulysses" else ("contiguous",):
            options: Any = validate_options(registry, "attention", "jax-ring", {**given, "layout": name})
            backend = factory.build(options, mesh, AttentionAxes(), case.seq_len)
            for documents, ids in (("one", None), ("packed", packed(case))):
                layout = SequenceLayout(name, case.world // inner)
                blocks = executed_blocks(CAUSAL, layout, case.seq_len, case.block, ids)
                order = backend.layout.permutation(case.seq_len)
                segments = None if ids is None else jnp.asarray(ids[order][None])

                def loss(q, k, v, dout, backend=backend, segments=segments):  # type: ignore[no-untyped-def]
                    return (backend.attend(q, k, v, CAUSAL, segments) * dout).sum()

                step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
                arrays = [x[:, order] for x in (q, k, v, dout)]
                seconds = list(timed(step, arrays, case.rounds))
                cost = strategy_cost(
                    strategy, AttentionShape(case.seq_len, case.heads, case.heads, case.head_dim, element_bytes=4),
                    case.world, MachineRates(1.0, 1.0), layout.kind, inner,
                )  # fmt: skip
                row = {
                    "strategy": strategy, "inner": inner, "layout": name, "documents": documents,
                    "blocks_most": int(blocks.max()), "blocks_mean": float(blocks.mean()),
                    "heads": case.heads // inner, "bytes_sent": cost.sent, "seconds": seconds,
                }  # fmt: skip
                console.print(f"[dim]{strategy} {name} {documents}: {min(seconds):.2f} s[/dim]", highlight=False)
                yield row


def timed(step: Any, arrays: list[jax.Array], rounds: int) -> Iterator[float]:
    """Seconds of ``rounds`` calls, after one that compiles and warms."""
    jax.block_until_ready(step(*arrays))
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready(step(*arrays))
        yield time.perf_counter() - began


def show(result: dict[str, Any], console: Console) -> None:
    """The table for people."""
    case = result["case"]
    table = Table(
        title=f"strategies: S={case['seq_len']}, H=K={case['heads']}, D={case['head_dim']}, float32, causal, "
        f"{case['world']} host devices, forward+backward",
        box=box.SIMPLE_HEAD, title_justify="left", title_style="bold",
    )  # fmt: skip
    for column in ("strategy", "layout", "documents"):
        table.add_column(column)
    for column in ("blocks a rank", "most / mean", "MB sent a rank", "seconds", "of the least"):
        table.add_column(column, justify="right")
    least = {
        kind: min(statistics.median(row["seconds"]) for row in result["rows"] if row["documents"] == kind)
        for kind in ("one", "packed")
    }
    for row in result["rows"]:
        middle = statistics.median(row["seconds"])
        table.add_row(
            row["strategy"] + (f", inner {row['inner']}" if row["strategy"] == "usp" else ""),
            row["layout"], row["documents"],
            f"{row['blocks_mean']:.0f} x {row['heads']} heads",
            f"{row['blocks_most'] / row['blocks_mean']:.2f}",
            f"{row['bytes_sent'] / 1e6:.1f}",
            f"{middle:.2f}", f"{middle / least[row['documents']]:.2f}×",
        )  # fmt: skip
    console.print(table)
    machine = result["hardware"]
    console.print(
        f"Median of {case['rounds']} rounds; blocks of {case['block']} tokens; packed documents of {case['document']} "
        f"tokens in the mean.\n{machine['cpu']}, {machine['cores']} cores, load {machine['load_before']} before.",
        highlight=False,
    )
    if result["smoke"]:
        console.print("[yellow]--smoke: this shows that the benchmark runs; its figures mean nothing.[/yellow]")


def main(arguments: list[str]) -> int:
    """Measure, show, and write where it was asked for; the exit code."""
    parser = argparse.ArgumentParser(prog="nox -s bench -- strategies", description=__doc__.split("\n")[0])
    add_output(parser, RESULT)
    given, console = parser.parse_args(arguments), Console()
    try:
        target = output_target(given, RESULT)
        case, machine = SMOKE if given.smoke else Case(), {**hardware(), "load_before": load()}
        rows = list(measure(case, console))
    except LwmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    result = {
        "benchmark": "strategies", "smoke": given.smoke, "date": date.today().isoformat(), "hardware": machine,
        "versions": {"jax": jax.__version__}, "case": asdict(case), "rows": rows,
    }  # fmt: skip
    show(result, console)
    if target is not None:
        target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        console.print(f"Written to {target}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
