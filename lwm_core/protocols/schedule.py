"""The stages of a run, and what a context plugin makes them from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lwm_core.model import ModelConfig
from lwm_core.rope import RopeSpec


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
