"""What the tests of the trainer share: a small model, a batch, trainers on any mesh, and processes to run them in."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from lwm_core.batch import PackedBatch, TokenSequence, pack_rows
from lwm_core.model import ModelConfig, preset
from lwm_core.protocols import OptimizerSpec, Stage, TrainerContext
from lwm_core.rope import RopeSpec
from lwm_core.vocab import Vocabulary
from lwm_torch_ring.attention.backend import factory
from lwm_torch_ring.attention.options import AttentionOptions
from lwm_torch_ring.train.options import TrainerOptions
from lwm_torch_ring.train.trainer import TorchTrainer

ROPE = RopeSpec(10_000.0)
ALPHAS = {"text": 0.5, "vision": 0.25}


def model(text: int = 100, **changes: Any) -> ModelConfig:
    """Two layers, grouped heads, both modalities."""
    values = {"hidden_size": 64, "intermediate_size": 96, "num_layers": 2, **changes}
    return preset("tiny", Vocabulary(text, 20, 16), **values)


def batch(seq_len: int = 72) -> PackedBatch:
    """Four rows: documents of unequal lengths and weights, padding, text and vision targets."""
    random = np.random.default_rng(0)
    lengths = ([40, 20], [64], [3, 50], [10, 1, 10, 9])
    return pack_rows(
        [[TokenSequence(random.integers(0, 120, n), random.random(n)) for n in row] for row in lengths], seq_len
    )


def make_trainer(
    mesh: str = "1,1,1,-1", *, accumulate: int = 1, seq_len: int = 72, rows: int = 4, lr: float = 1e-3,
    config: ModelConfig | None = None, attention: dict[str, Any] | None = None, clip_norm: float = 1.0,
    rope: RopeSpec = ROPE, **options: Any,
) -> TorchTrainer:  # fmt: skip
    """A trainer whose stage has begun."""
    context = TrainerContext(
        config or model(), factory, AttentionOptions(**{"chunk": 16, **(attention or {})}),
        OptimizerSpec(clip_norm=clip_norm), ALPHAS, seed=7,
    )  # fmt: skip
    trainer = TorchTrainer(TrainerOptions(**{"loss_chunk": 16, "device": "cpu", **options}), context)
    trainer.begin_stage(stage(mesh, accumulate=accumulate, seq_len=seq_len, rows=rows, lr=lr, rope=rope))
    return trainer


def stage(
    mesh: str, *, accumulate: int = 1, seq_len: int = 72, rows: int = 4, lr: float = 1e-3, rope: RopeSpec = ROPE
) -> Stage:  # fmt: skip
    """Ten steps at a constant rate."""
    tokens = rows * seq_len
    return Stage("s", seq_len, rope, 10 * tokens, tokens, lr, lr, mesh=mesh, accumulate=accumulate)


def rows_of(trainer: TorchTrainer, of: PackedBatch | None = None) -> PackedBatch:
    """The trainer's data rank's rows of a batch, in its layout."""
    of = of or batch(trainer.stage.seq_len)
    order = trainer.layout.permutation(of.shape[1])
    rank, world = trainer.data_rank(trainer.stage)
    size = of.shape[0] // world
    return of.map(lambda array: array[rank * size : (rank + 1) * size, order])


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def start_ranks(world: int, script: Path, *arguments: str, **environment: str) -> list[subprocess.Popen[str]]:
    """``world`` processes of a script, told their places as torchrun does."""
    port = str(free_port())
    return [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env={
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1", **environment,
            },
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip


def run_ranks(world: int, script: Path, *arguments: str, seconds: float = 200, **environment: str) -> list[str]:
    """What each of ``world`` processes prints; an error of any of them fails the test with what it said."""
    processes = start_ranks(world, script, *arguments, **environment)
    try:
        ended = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, (_, said)) in enumerate(zip(processes, ended, strict=True)):
        assert process.returncode == 0, f"rank {rank} of {world}: {said[-3000:]}"
    return [told for told, _ in ended]
