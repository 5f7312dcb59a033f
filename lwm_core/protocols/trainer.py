"""What a trainer plugin gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from lwm_core.batch import PackedBatch
from lwm_core.layout import SequenceLayout
from lwm_core.model import ModelConfig
from lwm_core.protocols.attention import AttentionFactory
from lwm_core.protocols.generation import Generator, Scorer
from lwm_core.protocols.processes import Processes
from lwm_core.protocols.schedule import Stage

Metrics = dict[str, float]


@dataclass(frozen=True)
class OptimizerSpec:
    """AdamW's constants; the learning rate is the stage's."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0


@dataclass(frozen=True)
class TrainerContext:
    """What a trainer factory may need."""

    model: ModelConfig
    attention: AttentionFactory
    attention_options: Any
    optimizer: OptimizerSpec
    loss_weights: Mapping[str, float]
    seed: int


class SaveHandle(Protocol):
    """A save that may still be on its way to disk.

    On rank 0, "everything" is what *every* rank writes: the core commits the checkpoint as soon as rank 0's handle is
    done. On the other ranks it is their own files. No call needs another rank to be in a call of its own, so the ranks'
    saves go on in the background by themselves.
    """

    def done(self) -> bool:
        """Whether everything is on disk, or has failed; never waits."""
        ...

    def wait(self) -> None:
        """Wait until it is; raises what went wrong, on rank 0 whichever rank it went wrong on."""
        ...


class Trainer(Protocol):
    """Parameters and optimizer on devices. Batches come in the layout's order, everything else in natural order.

    A trainer may run in several processes. Every one of them then makes the same calls in the same order, so whatever
    touches parameters may be collective, and what comes back is the same on every rank. What one rank alone meets while
    it is in a collective call ends that process; its siblings notice by their connection to it.
    """

    @property
    def processes(self) -> Processes:
        """The processes that this trainer runs in, from its making on; ``ALONE`` for one that has no siblings."""
        ...

    def begin_stage(self, stage: Stage) -> None:
        """Take up ``stage``: its mesh, length, RoPE, fresh optimizer moments; the parameters stay.

        Raises ShapeError when the mesh does not fit the devices or the batch.
        """
        ...

    def choices(self) -> Sequence[str]:
        """What was left to the trainer in the current stage, and how it chose: lines that are shown once a stage.

        Asked on rank 0 alone.
        """
        ...

    @property
    def layout(self) -> SequenceLayout:
        """The layout that batches of the current stage must be permuted to."""
        ...

    def data_rank(self, stage: Stage) -> tuple[int, int]:
        """(rank, world) of the rows that this process feeds in ``stage``, which need not have begun.

        Processes that hold parts of the same rows (``sp``, ``tp``) have the same rank, and each feeds the whole rows.
        """
        ...

    def step(self, batch: PackedBatch, step: int) -> Metrics:
        """One optimizer step, the stage's ``step`` from 0.

        Returns at least ``loss``, ``grad_norm``, ``lr`` and ``loss_<modality>``, of all ranks' rows together.
        """
        ...

    def evaluate(self, batch: PackedBatch) -> Metrics:
        """The same losses without a step."""
        ...

    def save(self, folder: Path) -> SaveHandle:
        """Start writing parameters and optimizer into ``folder``, which is empty; each rank writes its own files.

        A rank that cannot write its part still takes part in whatever the others do together here, and then raises.
        """
        ...

    def restore(self, folder: Path) -> None:
        """Read what :meth:`save` wrote, on whatever mesh the current stage has."""
        ...

    def iter_parameters(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """(canonical name, one unstacked array), one at a time; in the same order on every rank."""
        ...

    def load_parameters(self, parameters: Mapping[str, NDArray[Any]]) -> None:
        """Take parameters by canonical name from a lazy mapping; raises CheckpointError naming what does not fit."""
        ...

    def generator(self) -> Generator:
        """Generation with the current parameters and the current stage's RoPE."""
        ...

    def scorer(self) -> Scorer:
        """Log-likelihoods with the current parameters and the current stage's RoPE."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """Devices, framework and kernel versions, and choices, for run.json."""
        ...


class TrainerFactory(Protocol):
    """The factory of a ``lwm.trainer.v1`` plugin."""

    def __call__(self, options: Any, context: TrainerContext) -> Trainer:
        """A trainer with freshly initialised parameters."""
        ...
