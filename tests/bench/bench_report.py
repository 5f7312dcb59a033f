"""How a benchmark with a page shows and keeps its table: for people, as JSON, and between the marks of its page."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench_result import BUSY, output_target
from bench_torch_page import command, markdown_table, write_figures
from rich import box
from rich.console import Console
from rich.table import Table

from lwm_core.errors import LwmError

Rows = tuple[list[str], list[list[str]]]


def show(result: dict[str, Any], table: Rows, footnote: str, console: Console) -> None:
    """The table, what it takes to read it, and what makes its figures doubtful. Cells in ``**`` are bold."""
    head, rows = table
    shown = Table(title=result["benchmark"], box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for column in head:
        shown.add_column(column, justify="left" if column == head[0] else "right")
    for row in rows:
        shown.add_row(*(cell.strip("*") for cell in row), style="bold" if row[0].startswith("**") else "")
    console.print(shown)
    console.print(footnote, highlight=False)
    if (result["hardware"]["load_before"] or 0) > BUSY:
        console.print("[yellow]The machine was busy when this began: measure again on a quiet one.[/yellow]")
    if result["smoke"]:
        console.print("[yellow]--smoke: this shows that the benchmark runs; its figures mean nothing.[/yellow]")


def run(
    script: Path, arguments: Sequence[str], given: Namespace, kept: Path,
    measure: Callable[[Console], dict[str, Any]], table: Callable[[dict[str, Any]], Rows],
    footnote: Callable[[dict[str, Any]], str],
) -> int:  # fmt: skip
    """Measure, show, and write where ``given`` asks for it (``--write``: to ``kept`` and its page); the exit code."""
    console = Console()
    try:
        target = output_target(given, kept)
        result = {**measure(console), "command": command(script, arguments)}
        told, note = table(result), footnote(result)
        show(result, told, note, console)
        if target is not None:
            target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            console.print(f"Written to {target}", highlight=False)
        if given.write:
            figures = f"{markdown_table(*told)}\n\n{note}\n\n`{result['command']}`"
            write_figures(kept.with_suffix(".md"), figures)
    except LwmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0
