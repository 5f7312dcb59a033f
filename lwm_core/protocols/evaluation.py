"""What an eval plugin gives, and what it sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lwm_core.protocols.generation import Generator, Scorer
from lwm_core.protocols.schedule import Stage
from lwm_core.protocols.tokenizer import Tokenizer


@dataclass(frozen=True)
class EvalContext:
    """What a suite sees; it never sees a trainer.

    Args:
        stage: name of the stage the model has just ended; ``base`` before the first.
        stages: every stage of the run in order, so that a suite knows the lengths it will be asked for.
        out: file prefix: rows go to ``<out>.json`` (a suite may keep a ``<out>.jsonl`` while it runs).
        held_out: gives the data source's texts that were never trained on (see :meth:`DataSource.held_out`).
        progress: called with (done, total) as samples are finished.
    """

    generator: Generator
    scorer: Scorer
    tokenizer: Tokenizer
    stage: str
    stages: Sequence[Stage]
    out: Path
    seed: int
    held_out: Callable[[], Sequence[str]] = tuple
    base_dir: Path = Path(".")
    start_seq_len: int | None = None
    progress: Callable[[int, int], None] = field(default=lambda done, total: None)


class EvalSuite(Protocol):
    """What a ``lwm.eval.v1`` factory gives when called with its options."""

    def run(self, context: EvalContext) -> Sequence[Mapping[str, Any]]:
        """Evaluate one stage, continuing what an interrupted run left; returns the summary rows of that stage."""
        ...

    def draw(self, out: Path) -> Mapping[str, bytes]:
        """Figures of what has been evaluated so far: title → SVG or PNG bytes; empty when there is nothing."""
        ...
