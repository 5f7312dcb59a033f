"""The figures of a benchmark's page: written between two marks, all around them left as it is; and by which command."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from lwm_core.errors import LwmError

BEGIN, END = "<!-- figures: written by --write -->", "<!-- end of figures -->"


def command(script: Path, arguments: Sequence[str]) -> str:
    """What was run: by nox, or the script itself."""
    name = script.stem.replace("_", "-")
    by_nox = "NOX_CURRENT_SESSION" in os.environ
    return shlex.join([*(("nox", "-s", "bench", "--", name) if by_nox else ("python", script.name)), *arguments])


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [list(head), ["---", *("---:" for _ in head[1:])], *map(list, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_figures(page: Path, figures: str) -> None:
    """Put ``figures`` between the marks of ``page``.

    Raises:
        LwmError: the page does not have each mark once, in order.
    """
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise LwmError(f"{page}: expected the lines {BEGIN!r} and {END!r} once each, in this order; put them back")
    page.write_text(f"{before}{BEGIN}\n\n{figures.strip()}\n\n{END}{after}", encoding="utf-8")
