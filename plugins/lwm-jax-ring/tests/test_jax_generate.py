"""Generation and scoring against the oracle, sampling against a NumPy of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_cases import ROPE

from lwm_core.batch import TokenSequence, pack_rows
from lwm_core.errors import ShapeError
from lwm_core.model import ModelConfig
from lwm_core.protocols import SamplingSpec
from lwm_core.reference import llama_logits
from lwm_core.rope import RopeSpec
from lwm_jax_ring.generate.sample import sample

PROMPTS = [list(np.random.default_rng(n).integers(0, 100, n)) for n in (5, 70, 9)]


@pytest.fixture(scope="module", params=["1,1,1,8", "1,1,2,4", "1,2,1,4"])
def trainer(request: pytest.FixtureRequest, make_trainer: Callable[..., Any]) -> Any:
    return make_trainer(request.param)


def oracle(parameters: Any, config: ModelConfig, ids: list[int], rope: RopeSpec = ROPE) -> np.ndarray:
    """Logits ``[N, text ids]``."""
    row = pack_rows([[TokenSequence(np.array(ids), np.ones(len(ids)))]], len(ids))
    return llama_logits(parameters, config, rope, row)[0][:, config.vocabulary.slices["text"]]


def test_greedy_equals_the_oracle_for_unequal_prompts(trainer: Any, config: ModelConfig) -> None:
    parameters = dict(trainer.iter_parameters())
    written = trainer.generator().generate(PROMPTS, SamplingSpec(max_new_tokens=4))
    for prompt, new in zip(PROMPTS, written, strict=True):
        ids = list(prompt)
        assert len(new) == 4
        for token in new:
            assert token == oracle(parameters, config, ids)[-1].argmax()
            ids.append(token)


def test_scores_equal_the_oracle(trainer: Any, config: ModelConfig) -> None:
    parameters = dict(trainer.iter_parameters())
    logits = oracle(parameters, config, PROMPTS[1])[:-1]
    np.testing.assert_allclose(trainer.scorer().log_likelihood(PROMPTS[1]), chosen(logits, PROMPTS[1]), atol=2e-5)


def chosen(logits: np.ndarray, ids: list[int]) -> np.ndarray:
    """The log-probabilities of ``ids`` after the first."""
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return scores[np.arange(len(scores)), ids[1:]]


def test_a_new_stage_brings_its_rope_to_compiled_programs(
    make_trainer: Callable[..., Any], config: ModelConfig
) -> None:
    trainer = make_trainer("1,1,1,8")
    parameters = dict(trainer.iter_parameters())
    before = trainer.scorer().log_likelihood(PROMPTS[1])
    other = RopeSpec(30.0, attention_factor=1.1)
    trainer.begin_stage(replace(trainer.stage, rope=other))
    trainer.load_parameters(parameters)
    after = trainer.scorer().log_likelihood(PROMPTS[1])
    assert np.abs(after - before).max() > 1e-3
    expected = chosen(oracle(parameters, config, PROMPTS[1], other)[:-1], PROMPTS[1])
    np.testing.assert_allclose(after, expected, atol=2e-5)


def test_streaming_stops_where_it_should(trainer: Any) -> None:
    sampling = SamplingSpec(max_new_tokens=6)
    [whole] = trainer.generator().generate([PROMPTS[0]], sampling)
    assert list(trainer.generator().stream(PROMPTS[0], sampling)) == whole
    stop = SamplingSpec(max_new_tokens=6, stop_ids=(whole[3],))
    cut = whole[: whole.index(whole[3])]
    assert list(trainer.generator().stream(PROMPTS[0], stop)) == cut
    assert trainer.generator().generate([PROMPTS[0]], stop) == [cut]


def test_draws_depend_on_the_seed_alone(trainer: Any) -> None:
    def draw(seed: int) -> list[int]:
        sampling = SamplingSpec(max_new_tokens=12, temperature=1.5, seed=seed)
        return trainer.generator().generate([PROMPTS[0]], sampling)[0]  # type: ignore[no-any-return]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_vision_tokens_come_from_their_slice(trainer: Any, config: ModelConfig) -> None:
    [ids] = trainer.generator().generate([PROMPTS[0]], SamplingSpec(max_new_tokens=3, modality="vision"))
    assert all(100 <= token < 120 for token in ids)


@pytest.mark.parametrize("prompts", [[[]], [[1, 2], [500]], [[-1]]])
def test_prompts_that_are_no_prompts_are_refused(prompts: list[list[int]], trainer: Any) -> None:
    with pytest.raises(ShapeError, match="prompt"):
        trainer.generator().generate(prompts, SamplingSpec())


def _allowed(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The ids that may be drawn, worked out one by one."""
    order = np.argsort(-logits, kind="stable")
    if top_k:
        order = order[:top_k]
    weights = np.exp((logits[order] - logits.max()) / temperature)
    weights /= weights.sum()
    kept, reached = set(), 0.0
    for token, weight in zip(order, weights, strict=True):
        if reached >= top_p or weight < min_p * weights[0]:
            break
        kept.add(int(token))
        reached += weight
    return kept


@pytest.mark.parametrize(
    "temperature,top_k,top_p,min_p",
    [(1.0, 0, 1.0, 0.0), (1.0, 3, 1.0, 0.0), (0.7, 0, 0.6, 0.0), (2.0, 5, 0.5, 0.0), (1.0, 0, 1.0, 0.2),
     (2.0, 5, 0.9, 0.5)],
)  # fmt: skip
def test_sampling_draws_what_may_be_drawn(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Every allowed id comes, no other does, in about the right shares."""
    logits = np.random.default_rng(0).standard_normal(12).astype(np.float32) * 1.5
    spec = SamplingSpec(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    draws = sample(jnp.tile(logits, (20_000, 1)), jax.random.key(0), spec)
    counts = np.bincount(np.asarray(draws), minlength=12)
    allowed = _allowed(logits, temperature, top_k, top_p, min_p)
    weights = np.array([np.exp(logits[i] / temperature) if i in allowed else 0.0 for i in range(12)])
    shares = weights / weights.sum()
    assert set(np.flatnonzero(counts)) <= allowed
    np.testing.assert_allclose(counts / counts.sum(), shares, atol=0.015)
    assert (np.asarray(sample(jnp.asarray(logits)[None], jax.random.key(1), SamplingSpec())) == logits.argmax()).all()
