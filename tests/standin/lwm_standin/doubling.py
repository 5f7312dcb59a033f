"""A schedule, and weights from a folder that the environment names."""

from __future__ import annotations

import os
from pathlib import Path

from lwm_core.protocols import Stage, StartModel, WeightsBundle
from lwm_core.rope import RopeSpec
from lwm_standin.options import DoublingOptions


def schedule(options: DoublingOptions, start: StartModel) -> list[Stage]:
    """Each stage twice as long as the one before, four steps of 512 tokens."""
    lengths = [options.first * 2**i for i in range(options.stages)]
    return [
        Stage(name=f"x{length}", seq_len=length, rope=RopeSpec(1e4 * length), tokens=2048, batch_tokens=512, lr=0.5,
              min_lr=0.05)
        for length in lengths
    ]  # fmt: skip


def bundle() -> WeightsBundle:
    """The folder that ``STANDIN_BASE`` names."""
    return WeightsBundle("standin-base", Path(os.environ["STANDIN_BASE"]))
