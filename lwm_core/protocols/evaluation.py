"""What an eval plugin gives, and what it sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lwm_core.protocols.encoder import VisionEncoder
from lwm_core.protocols.generation import Generator, Scorer
from lwm_core.protocols.schedule import Stage
from lwm_core.protocols.tokenizer import Tokenizer
from lwm_core.shards import Settings
from lwm_core.vocab import Vocabulary


@dataclass(frozen=True, kw_only=True)
class EvalSetup:
    """What a suite is told that does not change in a run: enough to refuse what cannot be evaluated.

    Args:
        tokenizer: text to ids and back.
        vocabulary: the model's ids; where clips stand among them.
        stages: every stage of the run in order, so that a suite knows the lengths it will be asked for.
        seed: of everything random.
        encoder: frames to codes and back; there for suites whose spec says ``capabilities={"encoder": True}``, and for
            them always.
        trained_codes: data source → how the codes that it trains on were made (see :class:`TrainsOnCodes`).
        held_out: gives the data source's texts that were never trained on (see :meth:`DataSource.held_out`).
        held_out_clips: folder of codes that is trained on → names of its clips that are not (see
            :class:`HoldsOutClips`); a clip of such a folder that is not among them must not be evaluated on.
        base_dir: where relative paths start.
        start_seq_len: length that the starting model was trained at; none where it is not known.
    """

    tokenizer: Tokenizer
    vocabulary: Vocabulary
    stages: Sequence[Stage]
    seed: int
    encoder: VisionEncoder | None = None
    trained_codes: Mapping[str, Settings] = field(default_factory=dict)
    held_out: Callable[[], Sequence[str]] = tuple
    held_out_clips: Mapping[Path, Sequence[str]] = field(default_factory=dict)
    base_dir: Path = Path(".")
    start_seq_len: int | None = None


@dataclass(frozen=True, kw_only=True)
class EvalContext(EvalSetup):
    """What a suite sees; it never sees a trainer.

    Args:
        generator: generation with the stage's parameters.
        scorer: log-likelihoods by them.
        stage: name of the stage the model has just ended; ``base`` before the first.
        out: file prefix: rows go to ``<out>.json`` (a suite may keep a ``<out>.jsonl`` while it runs).
        progress: called with (done, total) as samples are finished.
    """

    generator: Generator
    scorer: Scorer
    stage: str
    out: Path
    progress: Callable[[int, int], None] = field(default=lambda done, total: None)


class EvalSuite(Protocol):
    """What a ``lwm.eval.v1`` factory gives when called with its options; see also :class:`ChecksSetup`."""

    def run(self, context: EvalContext) -> Sequence[Mapping[str, Any]]:
        """Evaluate one stage, continuing what an interrupted run left; returns the summary rows of that stage."""
        ...

    def draw(self, out: Path) -> Mapping[str, bytes]:
        """Figures of what has been evaluated so far: title → SVG or PNG bytes; empty when there is nothing."""
        ...


@runtime_checkable
class ChecksSetup(Protocol):
    """A suite that can say before the first step that it will not be able to run."""

    def check(self, setup: EvalSetup) -> None:
        """Raise an LwmError, in one line, where :meth:`EvalSuite.run` would whatever was trained. Writes nothing."""
        ...
