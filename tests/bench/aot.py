"""``nox -s aot``: LWM's training steps through the real TPU compiler, in one table.

Each row is one ``lwm aot`` in a process of its own: the text stages on the machine that the paper had, the vision
stages on three machines, the longest context with one sequence a batch, and steps whose tokens a device stay as they
are while devices and context grow, whose memory must then stay as it is too. No TPU is needed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench_result import add_output, hardware, output_target
from rich import box
from rich.console import Console
from rich.table import Table

from lwm_core.errors import LwmError, UsageError

CONFIGS = Path(__file__).parent / "aot"
RESULT = Path(__file__).parents[2] / "docs" / "benchmarks" / "aot.json"
GIB = 2**30
WIDTH = 130
"""Columns that the table needs."""
FLAT = "flat"
"""The group whose rows are compared with each other."""


@dataclass(frozen=True)
class Row:
    """One step: the group it is shown in, recipe or file, stage, topology, and values set with ``-s``."""

    group: str
    source: str
    stage: str
    topology: str
    overrides: tuple[str, ...] = ()


def file(name: str) -> str:
    """A file of stages that lies beside this script."""
    return str(CONFIGS / f"{name}.toml")


OFFLOAD = ("trainer.remat=offload",)
BEST = ('stages.4.mesh="1,4,4,16"',)
"""The mesh that ``lwm plan lwm-text --hardware v4-512`` finds for the stage of a million tokens."""
VISION = ("1K", "8K", "Chat-32K", "Chat-128K", "Chat-1M")
PODS = ("v4:8x8x8", "v5p:8x8x4", "v6e:16x16")
ROWS = (
    *(Row("text", "lwm-text", stage, "v4:8x8x4") for stage in ("32K", "128K", "256K", "512K", "1M")),
    Row("text", "lwm-text", "1M", "v4:8x8x4", OFFLOAD),
    Row("best", "lwm-text", "1M", "v4:8x8x4", BEST),
    *(Row("vision", file("vision"), stage, where) for where in PODS for stage in VISION),
    *(Row("push", file("push"), stage, "v4:8x8x4") for stage in ("1M", "4M", "8M")),
    *(Row("push", file("push"), stage, "v4:8x8x4", OFFLOAD) for stage in ("8M", "16M")),
    Row(FLAT, file(FLAT), "128K", "v5p:4x4x4"),
    Row(FLAT, file(FLAT), "256K", "v5p:4x4x8"),
    Row(FLAT, file(FLAT), "512K", "v5p:4x8x8"),
    Row(FLAT, file(FLAT), "1M", "v5p:8x8x8"),
)  # fmt: skip
SMOKE = (Row("smoke", file("smoke"), "8K", "v5p:2x2x1"),)


def compiled(row: Row) -> dict[str, Any]:
    """What ``lwm aot`` tells of the row.

    Raises:
        UsageError: the command failed; with what it said.
    """
    words = [word for override in row.overrides for word in ("-s", override)]
    command = [sys.executable, "-c", "import sys; from lwm_core.cli import main; sys.exit(main())", "aot", row.source,
               "--topology", row.topology, "--stage", row.stage, "--json", *words]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if not done.stdout.strip():
        raise UsageError(f"aot: {row.stage} of {row.source} on {row.topology}: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)[0]
    sent: dict[str, dict[str, int]] = {}
    axes: dict[str, int] = {}
    for one in found.pop("collectives"):
        kind, over = sent.setdefault(one["kind"], {"count": 0, "bytes": 0}), "+".join(one["axes"])
        kind["count"] += one["count"]
        kind["bytes"] += one["sent"] * one["count"]
        axes[over] = axes.get(over, 0) + one["sent"] * one["count"]
    remat = "offload" if row.overrides == OFFLOAD else "attention"
    return {"group": row.group, "remat": remat, **found, "sent": sent, "axes": axes}


def beside_shares(row: dict[str, Any]) -> int:
    """Temporary bytes a device without what devices share out among them: gradients, and parameters to compute with."""
    return int(row["temporary_bytes"] - 2 * row["parameter_bytes"])


def flatness(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Of each row of the group ``flat``, :func:`beside_shares` as a share of the group's mean."""
    found = [beside_shares(row) for row in rows if row["group"] == FLAT]
    return [one / statistics.mean(found) for one in found] if found else []


def show(result: dict[str, Any], console: Console) -> None:
    """A table for each group, and how flat the last one is."""
    for group in dict.fromkeys(row["group"] for row in result["rows"]):
        table = Table(title=f"aot, {group}", box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
        for column in ("stage", "rows", "mesh", "devices", "remat"):
            table.add_column(column)
        for column in ("GiB a device", "of", "temporary", "unshared", "on the host", "sent", "compiled in"):
            table.add_column(column, justify="right")
        for row in result["rows"]:
            if row["group"] == group:
                table.add_row(*cells(row))
        console.print(table)
    flat = flatness(result["rows"])
    if flat:
        told = ", ".join(f"{100 * (share - 1):+.1f}%" for share in flat)
        console.print(f"Temporary memory that is not shared out, from the mean of {FLAT}: {told}.", highlight=False)
    machine, versions = result["hardware"], result["versions"]
    console.print(
        f"libtpu {versions['libtpu']}, jax {versions['jax']}; compiled on {machine['cpu']}, {machine['cores']} cores.",
        highlight=False,
    )
    if result["smoke"]:
        console.print("[yellow]--smoke: this shows that the benchmark runs; its figures mean nothing.[/yellow]")


def cells(row: dict[str, Any]) -> list[str]:
    """The row for people; sizes in GiB."""
    head = [row["stage"], str(row["rows"]), row["mesh"], f"{row['devices']} {row['device_kind']}", row["remat"]]
    if row["problem"] is not None:
        return [*head, "does not fit", f"{row['limit_bytes'] / GIB:.2f}", "", "", "", "", f"{row['seconds']:.0f} s"]
    sizes = (row["bytes"], row["limit_bytes"], row["temporary_bytes"], beside_shares(row), row["host_bytes"])
    sent = f"{sum(row['axes'].values()) / GIB:.2f}" if "axes" in row else ""
    return [*head, *(f"{size / GIB:.2f}" for size in sizes), sent, f"{row['seconds']:.0f} s"]


def kept(rows: Sequence[dict[str, Any]], versions: dict[str, str], groups: Sequence[str]) -> list[dict[str, Any]]:
    """The committed table with ``rows`` in the place of those of their ``groups``, in the order of :data:`ROWS`.

    Raises:
        UsageError: the table is of another compiler.
    """
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    if found["versions"] != versions:
        raise UsageError(f"aot: {RESULT.name} is of {found['versions']}, and this is {versions}; leave out --group")
    order = list(dict.fromkeys(row.group for row in ROWS))
    whole = [*(row for row in found["rows"] if row["group"] not in groups), *rows]
    return sorted(whole, key=lambda row: order.index(row["group"]))


def main(arguments: list[str]) -> int:
    """Compile, show, and write where it was asked for; 1 where a step does not fit, else 0."""
    parser = argparse.ArgumentParser(prog="nox -s aot --", description=__doc__.split("\n")[0])
    add_output(parser, RESULT)
    groups = list(dict.fromkeys(row.group for row in ROWS))
    parser.add_argument(
        "--group",
        action="append",
        choices=groups,
        help="only these rows; repeatable; --write leaves the others as they are",
    )
    given, console = parser.parse_args(arguments), Console(width=max(Console().width, WIDTH))
    try:
        target, versions = output_target(given, RESULT), {name: version(name) for name in ("jax", "libtpu")}
        if given.write and given.group:
            kept([], versions, given.group)  # refused before anything is compiled
        rows = []
        for row in SMOKE if given.smoke else [row for row in ROWS if not given.group or row.group in given.group]:
            rows.append(compiled(row))
            told = rows[-1]["problem"] or f"{rows[-1]['bytes'] / GIB:.2f} GiB a device"
            console.print(f"[dim]{row.group} {row.stage} on {row.topology}: {told}[/dim]", highlight=False)
    except LwmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    result = {
        "benchmark": "aot", "smoke": given.smoke, "date": date.today().isoformat(), "hardware": hardware(),
        "versions": versions, "rows": rows,
    }  # fmt: skip
    show(result, console)
    if target is not None:
        if given.write and given.group:
            result["rows"] = kept(rows, versions, given.group)
        target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        console.print(f"Written to {target}", highlight=False)
    return int(any(row["problem"] is not None for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
