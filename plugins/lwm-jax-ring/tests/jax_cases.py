"""What the tests of this plugin share."""

from __future__ import annotations

from typing import Any

from lwm_core.batch import PackedBatch
from lwm_core.rope import RopeSpec

SEQ_LEN = 64
ROPE = RopeSpec(10_000.0)
ALPHAS = {"text": 0.5, "vision": 0.25}


def permuted(trainer: Any, batch: PackedBatch) -> PackedBatch:
    """The batch in the trainer's layout."""
    order = trainer.layout.permutation(batch.shape[1])
    return batch.map(lambda array: array[:, order])
