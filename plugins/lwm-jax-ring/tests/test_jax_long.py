"""A million tokens: what scoring and reading them would take, by the compiler's own count; nothing is run.

Shapes: B rows, S slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lwm_core.model import ModelConfig, preset
from lwm_core.vocab import Vocabulary
from lwm_jax_ring.generate.cache import HELD, layer_specs
from lwm_jax_ring.generate.reading import room
from lwm_jax_ring.generate.rows import Rows
from lwm_jax_ring.model.sharding import ROWS

LENGTHS = (65_536, 262_144, 1_048_576)


@pytest.fixture(scope="module")
def tiny() -> ModelConfig:
    """As in ``docs/benchmarks/reading.md``."""
    return preset("tiny", Vocabulary(4096), num_kv_heads=2)


def score_bytes(trainer: Any, tokens: int) -> int:
    """Temporary memory of the program that scores so many tokens, on a device."""
    scorer = trainer.generator()._scorer
    slots = scorer.slots(tokens)
    row = jax.ShapeDtypeStruct((8, slots), jnp.int32)
    _, program = scorer.program(slots)
    compiled = program.lower(trainer.parameters, scorer.rope(slots), *[row] * 4).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


@pytest.mark.slow
def test_scoring_a_million_tokens_takes_a_layers_memory(make_trainer: Callable[..., Any], tiny: ModelConfig) -> None:
    """Flat for each token from 64K on, and for a million what 8 streams of a layer take: under 12 GB in float32."""
    trainer = make_trainer("8,1,1,1", rows=8, model=tiny)  # a row a device
    taken = {tokens: score_bytes(trainer, tokens) for tokens in LENGTHS}
    a_token = [size / tokens for tokens, size in taken.items()]
    assert max(a_token) < 1.05 * min(a_token), taken
    assert taken[LENGTHS[-1]] < 12e9, taken


@pytest.mark.slow
def test_a_chunk_takes_the_same_memory_behind_any_cache(make_trainer: Callable[..., Any], tiny: ModelConfig) -> None:
    """A layer's program for one more chunk, with 64K and with a million slots behind it."""
    trainer = make_trainer("8,1,1,1", rows=8, model=tiny)  # a row a device
    programs = trainer.generator()._programs
    rows, chunk = Rows(trainer, programs, 8), trainer.options.read_chunk

    def taken(tokens: int) -> int:
        def placed(shape: tuple[int, ...], dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=programs.sharding(spec))

        cache = jax.eval_shape(lambda: programs.empty(8, room(tokens)))
        layer = jax.tree.map(lambda x, spec: placed(x.shape, x.dtype, spec), cache.layers[0], layer_specs("compute"))
        held = placed(cache.held.shape, jnp.int32, HELD)
        stream = placed((8, chunk, tiny.hidden_size), jnp.float32, P(ROWS, "sp", None))
        angles = placed((8, chunk, tiny.head_dim // 2), jnp.float32, P(ROWS, "sp", None))
        row, fill = placed((8, chunk), jnp.int32, P(ROWS, "sp")), np.zeros(1, np.int32)
        given = (rows._weights.layers[0], layer, stream, angles, angles, held, row, fill)
        compiled = programs.layer(chunk, False).lower(*given).compile()
        return int(compiled.memory_analysis().temp_size_in_bytes)

    few, many = taken(LENGTHS[0]), taken(LENGTHS[-1])
    assert many < 1.05 * few, (few, many)
