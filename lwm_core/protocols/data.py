"""What a data plugin gives: a source, and feeds that are pure functions of the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from lwm_core.batch import PackedBatch
from lwm_core.protocols.tokenizer import Tokenizer
from lwm_core.shards import Settings
from lwm_core.vocab import Vocabulary


@dataclass(frozen=True)
class DataContext:
    """What a data factory may need.

    Args:
        tokenizer: text to ids.
        vocabulary: the model's ids. A source of codes holds its codebook against ``vision_codes``; how many codes a
            frame has is recorded with the codes, so that no encoder need be there.
        seed: of everything random.
        base_dir: where relative paths start.
    """

    tokenizer: Tokenizer
    vocabulary: Vocabulary
    seed: int
    base_dir: Path = Path(".")


@dataclass(frozen=True)
class FeedRequest:
    """One data rank's part of one stage: rows ``[rank · rows/world, (rank+1) · rows/world)`` of every step."""

    stage_index: int
    seq_len: int
    rows: int
    rank: int = 0
    world: int = 1
    mix: Mapping[str, float] | None = None


class Feed(Protocol):
    """A pure function of the step: the same step gives the same rows, in any order, on any number of workers."""

    def batch(self, step: int) -> PackedBatch:
        """Rows ``[rows/world, seq_len]`` of the stage's ``step``, natural order."""
        ...

    def close(self) -> None:
        """End the workers."""
        ...


class DataSource(Protocol):
    """What a ``lwm.data.v1`` factory gives: opens a feed a stage and data rank."""

    def open(self, request: FeedRequest) -> Feed:
        """The feed of a data rank; raises DataError for an empty corpus and ShapeError for what does not divide."""
        ...

    def held_out(self) -> Sequence[str]:
        """Texts that no feed of this source ever trains on, for evaluation; empty when nothing is held out."""
        ...


@runtime_checkable
class TrainsOnCodes(Protocol):
    """A data source that knows how the codes that it feeds were made."""

    def code_settings(self) -> Mapping[str, Settings]:
        """Name of each of its sources of codes → how they were made, as their folder records it; may be empty."""
        ...


@runtime_checkable
class HoldsOutClips(Protocol):
    """A data source that knows which clips of the folders of codes that it trains on are left for evaluation."""

    def held_out_clips(self) -> Mapping[Path, Sequence[str]]:
        """Each folder of codes that a feed may train on, resolved → names of its clips that none does; may be empty."""
        ...
