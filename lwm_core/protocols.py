"""What a plugin of each kind gives. The core and the plugins meet in these types and in NumPy arrays, nowhere else.

A plugin's factory is called with its validated options first (its own pydantic model) and a context record second. The
records are frozen; they carry what the plugin may need and nothing else, never the whole configuration.

Shapes: B batch, S sequence, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from lwm_core.attention import AttentionMask
from lwm_core.batch import PackedBatch
from lwm_core.layout import SequenceLayout
from lwm_core.model import ModelConfig
from lwm_core.rope import RopeSpec
from lwm_core.vocab import Vocabulary

Array = Any
"""An array of the plugin's own framework, opaque to the core."""

Metrics = dict[str, float]


# -- attention ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionAxes:
    """Which mesh axes carry what: rows over ``batch``, heads over ``heads``, tokens over ``seq``."""

    batch: tuple[str, ...] = ("dp", "fsdp")
    heads: str = "tp"
    seq: str = "sp"


@runtime_checkable
class AttentionBackend(Protocol):
    """Attention bound to a mesh and a sequence length."""

    layout: SequenceLayout

    def attend(self, q: Array, k: Array, v: Array, mask: AttentionMask, segment_ids: Array | None = None) -> Array:
        """Differentiable attention of ``q [B,S,H,D]`` over ``k, v [B,S,K,D]``, tokens in the layout's order.

        JAX takes and gives global arrays inside jit; Torch takes this rank's shards. Raises UnsupportedError for what
        is not supported.
        """
        ...


@runtime_checkable
class AttentionHarness(Protocol):
    """A backend on real devices or processes, NumPy in and out, natural order: what the conformance kit drives."""

    def forward(
        self, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], mask: AttentionMask,
        segment_ids: NDArray[np.integer] | None = None,
    ) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """``out [B,S,H,D]`` and natural-log ``lse [B,S,H]``."""
        ...

    def backward(
        self, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], mask: AttentionMask, dout: NDArray[Any],
        segment_ids: NDArray[np.integer] | None = None,
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """``dq, dk, dv`` of ``sum(out · dout)``."""
        ...

    def close(self) -> None:
        """End the workers."""
        ...


@runtime_checkable
class AttentionFactory(Protocol):
    """The factory object of a ``lwm.attention.v1`` plugin."""

    def layout(self, options: Any, seq_len: int, world: int) -> SequenceLayout:
        """The layout of a sequence over ``world`` ranks; raises ShapeError for a length that does not divide."""
        ...

    def build(self, options: Any, mesh: Any, axes: AttentionAxes, seq_len: int) -> AttentionBackend:
        """The backend on the trainer's own mesh."""
        ...

    def harness(self, options: Any, world: int) -> AttentionHarness:
        """The backend on ``world`` devices that the harness sees to itself."""
        ...


# -- tokenizers, encoders and weights ------------------------------------------------------------------------------


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back."""

    @property
    def size(self) -> int:
        """Number of text ids."""
        ...

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Ids by role: ``bos``, ``eos``, ``pad`` where the tokenizer has them."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, no special ids added."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; special ids are left out."""
        ...

    def save(self, folder: Path) -> None:
        """Write what another machine needs to build the same tokenizer."""
        ...


@dataclass(frozen=True)
class WeightsBundle:
    """A model in a folder: what a ``lwm.weights.v1`` factory gives when called.

    The folder holds ``model.safetensors`` (canonical names), ``config.json`` (see ``lwm_core.weights``) and, where the
    text is not bytes, ``tokenizer.json``.
    """

    name: str
    folder: Path


@dataclass(frozen=True)
class TokenizerContext:
    """What a tokenizer factory may need: the folder of the model that the run starts from, and where paths start."""

    weights: WeightsBundle | None = None
    base_dir: Path = Path(".")


@runtime_checkable
class VisionEncoder(Protocol):
    """Frames to codes and back, NumPy in and out."""

    codes: int
    frame_size: int

    def encode(self, frames: NDArray[np.uint8]) -> NDArray[np.int32]:
        """``[T,H,W,3]`` uint8 → ``[T, h·w]`` int32."""
        ...

    def decode(self, codes: NDArray[np.int32]) -> NDArray[np.uint8]:
        """``[T, h·w]`` int32 → ``[T,H,W,3]`` uint8."""
        ...


# -- schedules -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One leg of a schedule. Lengths in tokens, rates a step."""

    name: str
    seq_len: int
    rope: RopeSpec
    tokens: int
    batch_tokens: int
    lr: float
    min_lr: float
    lr_schedule: str = "constant"
    warmup_steps: int = 0
    accumulate: int = 1
    mesh: str = "1,1,1,-1"
    mix: Mapping[str, float] | None = None

    @property
    def rows(self) -> int:
        """Rows of a step over all data ranks."""
        return self.batch_tokens // self.seq_len

    @property
    def steps(self) -> int:
        """Steps of the stage: ``tokens`` rounded up to whole steps."""
        return -(-self.tokens // self.batch_tokens)

    def lr_at(self, step: int) -> float:
        """Learning rate of the stage's ``step`` (from 0): linear warm-up from 0, then constant or cosine."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.lr_schedule == "constant":
            return self.lr
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.min_lr + 0.5 * (self.lr - self.min_lr) * (1.0 + float(np.cos(np.pi * min(1.0, progress))))


class ContextSchedule(Protocol):
    """A ``lwm.context.v1`` factory: ``schedule(options, start) -> stages``; ``start`` is the model begun from."""

    def __call__(self, options: Any, start: StartModel) -> Sequence[Stage]:
        """The stages in order."""
        ...


@dataclass(frozen=True)
class StartModel:
    """What a schedule starts from: the model, and the length and RoPE it was trained with where that is known."""

    model: ModelConfig
    seq_len: int | None = None
    rope: RopeSpec | None = None


# -- data ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataContext:
    """What a data factory may need."""

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


# -- trainers ------------------------------------------------------------------------------------------------------


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
    """A save that may still be on its way to disk."""

    def done(self) -> bool:
        """Whether everything is on disk."""
        ...

    def wait(self) -> None:
        """Wait until it is; raises what went wrong."""
        ...


class Trainer(Protocol):
    """Parameters and optimizer on devices. Batches come in the layout's order, everything else in natural order."""

    def begin_stage(self, stage: Stage) -> None:
        """Take up ``stage``: its mesh, length, RoPE, fresh optimizer moments; the parameters stay.

        Raises ShapeError when the mesh does not fit the devices or the batch.
        """
        ...

    @property
    def layout(self) -> SequenceLayout:
        """The layout that batches of the current stage must be permuted to."""
        ...

    @property
    def data_rank(self) -> tuple[int, int]:
        """(rank, world) of the rows that this process feeds."""
        ...

    def step(self, batch: PackedBatch, step: int) -> Metrics:
        """One optimizer step, the stage's ``step`` from 0.

        Returns at least ``loss``, ``grad_norm``, ``lr`` and ``loss_<modality>``.
        """
        ...

    def evaluate(self, batch: PackedBatch) -> Metrics:
        """The same losses without a step."""
        ...

    def save(self, folder: Path) -> SaveHandle:
        """Start writing parameters and optimizer into the empty ``folder``."""
        ...

    def restore(self, folder: Path) -> None:
        """Read what :meth:`save` wrote, on whatever mesh the current stage has."""
        ...

    def iter_parameters(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """(canonical name, one unstacked array), one at a time."""
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


@dataclass(frozen=True)
class SamplingSpec:
    """How tokens are drawn.

    Args:
        max_new_tokens: tokens written at most.
        temperature: 0 is greedy.
        top_k: keep the k likeliest; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probability reaches it.
        stop_ids: ids that end a row; the stop id itself is not returned.
        seed: seed of the draw.
        modality: vocabulary slice that is drawn from.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()
    seed: int = 0
    modality: str = "text"


class Generator(Protocol):
    """Token-in, token-out generation, natural order."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingSpec) -> list[list[int]]:
        """New tokens for each prompt; prompts may differ in length."""
        ...

    def stream(self, prompt: Sequence[int], sampling: SamplingSpec) -> Iterator[int]:
        """New tokens of one prompt, as they come."""
        ...


class Scorer(Protocol):
    """Teacher-forced scores."""

    def log_likelihood(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """``[N-1]`` natural-log probability of each token after the first."""
        ...


# -- evals ---------------------------------------------------------------------------------------------------------


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
