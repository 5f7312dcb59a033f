"""One process of several, or the only one: what a trainer gives on a mesh of four devices, printed as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
from jax_cases import ALPHAS, ROPE, SEQ_LEN

from lwm_core.batch import TokenSequence, pack_rows
from lwm_core.model import preset
from lwm_core.protocols import OptimizerSpec, SamplingSpec, Stage, TrainerContext
from lwm_core.vocab import Vocabulary
from lwm_jax_ring.attention.backend import factory
from lwm_jax_ring.attention.options import AttentionOptions
from lwm_jax_ring.train.options import TrainerOptions
from lwm_jax_ring.train.trainer import JaxTrainer


def stage(mesh: str) -> Stage:
    """Ten steps of four rows in two micro-batches."""
    return Stage("s", SEQ_LEN, ROPE, 40 * SEQ_LEN, 4 * SEQ_LEN, 1e-3, 1e-4, mesh=mesh, accumulate=2)


def main(meshes: list[str]) -> dict[str, Any]:
    """Train a step on each mesh in turn; the last one's model is asked."""
    config = preset("tiny", Vocabulary(100, 20, 16), hidden_size=64, intermediate_size=96, num_layers=2)
    attention = AttentionOptions(query_chunk=8, key_chunk=16, strategy="auto")
    context = TrainerContext(config, factory, attention, OptimizerSpec(), ALPHAS, seed=7)
    trainer = JaxTrainer(TrainerOptions(loss_chunk=16), context)
    random = np.random.default_rng(0)
    # The first two rows are text alone, so that processes of rows of their own see other modalities.
    rows = [[TokenSequence(random.integers(0, 120 if row > 1 else 100, 60), random.random(60))] for row in range(4)]
    batch = pack_rows(rows, SEQ_LEN)
    found: dict[str, Any] = {"metrics": []}
    for mesh in meshes:
        trainer.begin_stage(stage(mesh))
        rank, world = trainer.data_rank(trainer.stage)
        order = trainer.layout.permutation(SEQ_LEN)
        size = 4 // world
        here = batch.map(lambda array, at=rank * size, to=(rank + 1) * size, by=order: array[at:to, by])
        found["metrics"] += [trainer.step(here, 0), trainer.evaluate(here)]
    found["scores"] = trainer.scorer().log_likelihood(list(range(90))).tolist()
    found["tokens"] = trainer.generator().generate([[1, 2, 3], list(range(40)), [7]], SamplingSpec(max_new_tokens=4))
    parameters = dict(trainer.iter_parameters())
    found["sums"] = {name: float(np.abs(value).sum()) for name, value in parameters.items()}
    fresh = JaxTrainer(TrainerOptions(loss_chunk=16), context)
    fresh.load_parameters(parameters)
    fresh.begin_stage(stage(meshes[0]))
    found["same"] = all((parameters[name] == value).all() for name, value in fresh.iter_parameters())
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
