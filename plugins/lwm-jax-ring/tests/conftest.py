"""Eight host devices for this process, and small trainers on any mesh of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax_cases import ALPHAS, ROPE, SEQ_LEN

from lwm_core.batch import PackedBatch, TokenSequence, pack_rows
from lwm_core.model import ModelConfig, preset
from lwm_core.protocols import OptimizerSpec, Stage, TrainerContext
from lwm_core.rope import RopeSpec
from lwm_core.vocab import Vocabulary

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    """Two layers, grouped heads, both modalities."""
    return preset("tiny", Vocabulary(100, 20, 16), hidden_size=64, intermediate_size=96, num_layers=2)


@pytest.fixture(scope="session")
def batch() -> PackedBatch:
    """Four rows: documents of unequal lengths and weights, padding, text and vision targets."""
    random = np.random.default_rng(0)
    lengths = ([40, 20], [64], [3, 50], [10, 1, 10, 9])
    return pack_rows(
        [[TokenSequence(random.integers(0, 120, n), random.random(n)) for n in row] for row in lengths], SEQ_LEN
    )


@pytest.fixture(scope="session")
def make_trainer(config: ModelConfig) -> Callable[..., Any]:
    """``make_trainer(mesh, accumulate=1, seq_len=64, rows=4, model=None, attention={}, rope=ROPE, **options)``."""
    from lwm_jax_ring.attention.backend import factory
    from lwm_jax_ring.attention.options import AttentionOptions
    from lwm_jax_ring.train.options import TrainerOptions
    from lwm_jax_ring.train.trainer import JaxTrainer

    def make(
        mesh: str,
        accumulate: int = 1,
        seq_len: int = SEQ_LEN,
        rows: int = 4,
        model: ModelConfig | None = None,
        attention: dict[str, Any] | None = None,
        rope: RopeSpec = ROPE,
        **options: Any,
    ) -> JaxTrainer:
        attention_options = AttentionOptions(query_chunk=8, key_chunk=16, **(attention or {}))
        context = TrainerContext(model or config, factory, attention_options, OptimizerSpec(), ALPHAS, seed=7)
        trainer = JaxTrainer(TrainerOptions(**{"loss_chunk": 16, **options}), context)
        tokens = rows * seq_len
        trainer.begin_stage(
            Stage("s", seq_len, rope, 10 * tokens, tokens, 1e-3, 1e-4, mesh=mesh, accumulate=accumulate)
        )
        return trainer

    return make
