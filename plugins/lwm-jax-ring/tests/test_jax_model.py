"""Loss and gradients against the float64 oracle, on every mesh, packed and apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import PartitionSpec as P
from jax_cases import ALPHAS, ROPE, SEQ_LEN, permuted

from lwm_core.batch import PackedBatch, TokenSequence, pack_rows
from lwm_core.model import ModelConfig, canonical_shapes, preset
from lwm_core.reference import llama_logits, modality_loss
from lwm_core.rope import RopeSpec
from lwm_core.rope_scalings import llama3, yarn
from lwm_core.testing import relative_l2
from lwm_core.vocab import Vocabulary
from lwm_jax_ring.model.llama import Chunks
from lwm_jax_ring.model.names import iter_canonical
from lwm_jax_ring.model.rope import rope_angles, rope_tables

MESHES = ("1,2,2,2", "2,1,2,2", "1,1,1,8", "4,1,1,2", "1,1,4,2")


def gradients(trainer: Any, batch: PackedBatch, accumulate: int = 1) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and canonical gradients of one step."""
    arrays = trainer.device_batch(permuted(trainer, batch), accumulate)
    modalities = trainer.modalities(batch)
    run = jax.jit(trainer.current.program.gradients, static_argnums=2)
    grads, loss, _ = run(trainer.parameters, arrays, modalities)
    return float(loss), dict(iter_canonical(traverse_util.flatten_dict(grads), trainer.context.model))


@pytest.fixture(scope="module")
def on_eight(make_trainer: Callable[..., Any], batch: PackedBatch) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients on the mesh 1,1,1,8."""
    return gradients(make_trainer("1,1,1,8"), batch)


def test_loss_equals_the_oracle(make_trainer: Callable[..., Any], batch: PackedBatch, config: ModelConfig) -> None:
    trainer = make_trainer("1,1,1,8")
    parameters = dict(trainer.iter_parameters())
    assert {name: array.shape for name, array in parameters.items()} == canonical_shapes(config)
    expected, means = modality_loss(llama_logits(parameters, config, ROPE, batch), config, batch, ALPHAS)
    got = trainer.evaluate(permuted(trainer, batch))
    assert got["loss"] == pytest.approx(expected, rel=1e-5)
    assert got["loss_text"] == pytest.approx(means["text"], rel=1e-5)
    assert got["loss_vision"] == pytest.approx(means["vision"], rel=1e-5)


def test_gradients_equal_the_oracles_slope(
    make_trainer: Callable[..., Any], batch: PackedBatch, config: ModelConfig, on_eight: tuple[float, Any]
) -> None:
    """Along random directions, one parameter at a time, the slope is the float64 oracle's by central differences."""
    parameters = {k: v.astype(np.float64) for k, v in make_trainer("1,1,1,8").iter_parameters()}
    random = np.random.default_rng(3)
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight",
                 "model.layers.1.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"):  # fmt: skip
        direction = random.standard_normal(parameters[name].shape)

        def loss_at(step: float, name: str = name, direction: np.ndarray = direction) -> float:
            moved = {**parameters, name: parameters[name] + step * direction}
            return modality_loss(llama_logits(moved, config, ROPE, batch), config, batch, ALPHAS)[0]

        slope = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5
        assert float((on_eight[1][name] * direction).sum()) == pytest.approx(slope, rel=2e-4)


@pytest.mark.parametrize("mesh", MESHES)
def test_one_model_many_meshes(
    mesh: str, make_trainer: Callable[..., Any], batch: PackedBatch, on_eight: tuple[float, dict[str, np.ndarray]]
) -> None:
    loss, grads = gradients(make_trainer(mesh), batch)
    assert loss == pytest.approx(on_eight[0], rel=1e-6)
    for name, expected in on_eight[1].items():
        assert relative_l2(grads[name], expected) < 1e-5, name


@pytest.mark.parametrize("changes", [
    {"accumulate": 4}, {"remat": "full"}, {"remat": "none"}, {"remat": "dots"}, {"token_chunk": 5}, {"loss_chunk": 7},
    {"shard_parameters": []}, {"attention": {"layout": "striped"}}, {"attention": {"layout": "contiguous"}},
])  # fmt: skip
def test_how_it_is_computed_changes_nothing(
    changes: dict[str, Any], make_trainer: Callable[..., Any], batch: PackedBatch, on_eight: tuple[float, Any]
) -> None:
    """Micro-batches, rematerialisation, chunks, sharding and layout leave loss and gradients alone."""
    mesh = "1,1,1,8" if changes.get("accumulate") else "1,1,2,4"
    loss, grads = gradients(make_trainer(mesh, **changes), batch, changes.get("accumulate", 1))
    assert loss == pytest.approx(on_eight[0], rel=1e-6)
    for name, expected in on_eight[1].items():
        assert relative_l2(grads[name], expected) < 1e-5, name


def test_packed_equals_apart(make_trainer: Callable[..., Any], config: ModelConfig) -> None:
    """Documents packed into two rows give the loss and gradients of the same documents padded, one a row."""
    random = np.random.default_rng(5)
    documents = [TokenSequence(random.integers(0, 120, n), np.full(n, 1 / n)) for n in (30, 34, 9, 1, 17, 21, 13, 3)]
    packed = pack_rows([documents[:2], documents[2:]], SEQ_LEN)
    apart = pack_rows([[document] for document in documents], SEQ_LEN)
    loss, grads = gradients(make_trainer("1,1,2,4", rows=2), packed)
    loss_apart, grads_apart = gradients(make_trainer("1,1,2,4", rows=8), apart)
    assert loss == pytest.approx(loss_apart, rel=1e-6)
    for name, expected in grads_apart.items():
        assert relative_l2(grads[name], expected) < 1e-5, name


def test_the_head_is_cut_by_modalities_once_and_laid_out_as_it_was(
    make_trainer: Callable[..., Any], batch: PackedBatch, config: ModelConfig
) -> None:
    """Cut in every slice of the loss, it would be summed over devices whole for each of them and each modality."""
    trainer = make_trainer("1,2,2,2")
    arrays = trainer.device_batch(permuted(trainer, batch), 1)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), arrays)
    sums = jax.make_jaxpr(trainer.current.program.sums, static_argnums=2)
    jaxpr = sums(trainer.parameters, one, ("text", "vision")).jaxpr
    heads = {(ids.stop - ids.start, config.hidden_size) for ids in config.vocabulary.slices.values()}
    laid_out = {
        eqn.outvars[0].aval.shape: eqn.params["sharding"].spec
        for eqn in jaxpr.eqns if eqn.primitive.name == "sharding_constraint"
    }  # fmt: skip
    assert {shape: laid_out[shape] for shape in heads} == dict.fromkeys(heads, P("tp", ("fsdp", "sp")))
    looped = {x.aval.shape for eqn in jaxpr.eqns if eqn.primitive.name == "scan" for x in eqn.invars}
    assert heads <= looped and (config.vocabulary.size, config.hidden_size) not in looped


def test_a_modality_that_is_absent_gives_zero(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer("1,1,1,8")
    text = pack_rows([[TokenSequence(np.arange(64) % 100, np.ones(64))]] * 4, SEQ_LEN)
    got = trainer.evaluate(permuted(trainer, text))
    assert got["loss_vision"] == 0.0
    assert got["loss"] == pytest.approx(ALPHAS["text"] * got["loss_text"], rel=1e-6)


@pytest.mark.parametrize("changes", [{"num_kv_heads": 1}, {"num_kv_heads": 4}, {"tie_embeddings": False}])
def test_other_shapes_equal_the_oracle(
    changes: dict[str, Any], make_trainer: Callable[..., Any], batch: PackedBatch
) -> None:
    """One key-value head over tp = 2, as many as query heads, and an untied head."""
    model = preset("tiny", Vocabulary(100, 20, 16), hidden_size=64, intermediate_size=96, num_layers=1, **changes)
    trainer = make_trainer("1,1,2,4", model=model)
    parameters = dict(trainer.iter_parameters())
    expected, _ = modality_loss(llama_logits(parameters, model, ROPE, batch), model, batch, ALPHAS)
    assert trainer.evaluate(permuted(trainer, batch))["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rope", [
    RopeSpec(5e7), llama3(5e5, 16, factor=8.0, original=32), yarn(1e4, 16, factor=4.0, original=16),
], ids=["LWM at 1M", "llama3", "yarn"])  # fmt: skip
def test_other_ropes_equal_the_oracle(
    rope: RopeSpec, make_trainer: Callable[..., Any], batch: PackedBatch, config: ModelConfig
) -> None:
    """The loss, and the log-likelihood of every token of a text."""
    trainer = make_trainer("1,1,2,4", rope=rope)
    random = np.random.default_rng(5)
    given = {name: x + 0.1 * random.standard_normal(x.shape) for name, x in trainer.iter_parameters()}
    trainer.load_parameters(given)
    parameters = dict(trainer.iter_parameters())
    expected, _ = modality_loss(llama_logits(parameters, config, rope, batch), config, batch, ALPHAS)
    assert trainer.evaluate(permuted(trainer, batch))["loss"] == pytest.approx(expected, rel=1e-5)
    ids = random.integers(0, 100, 50)
    one = pack_rows([[TokenSequence(ids, np.ones(50))]], 50)
    logits = llama_logits(parameters, config, rope, one)[0, :-1, config.vocabulary.slices["text"]]
    scores = logits[np.arange(49), ids[1:]] - np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(trainer.scorer().log_likelihood(ids.tolist()), scores, rtol=1e-4, atol=1e-5)


def test_parameters_come_back_as_they_were_given(make_trainer: Callable[..., Any]) -> None:
    given = dict(make_trainer("1,1,1,8").iter_parameters())
    other = make_trainer("1,2,2,2")
    changed = {name: array + 1 for name, array in given.items()}
    other.load_parameters(changed)
    for name, array in other.iter_parameters():
        np.testing.assert_array_equal(array, changed[name])


@pytest.mark.parametrize("rope", [RopeSpec(1e4), RopeSpec(5e7), RopeSpec(1e4, (0.5,) * 32, 1.2)])
def test_rope_is_exact_a_million_tokens_away(rope: RopeSpec) -> None:
    """A plain float32 angle is off by 0.03 there."""
    positions = np.array([[0, 1, 1023, 1024, 65_537, 1_000_000, 1_048_575]], np.int32)
    cos, sin = rope_angles(rope_tables(rope, 64, 1_048_576), positions)
    expected_cos, expected_sin = rope.tables(positions, 64)
    np.testing.assert_allclose(cos, expected_cos, atol=4e-7)
    np.testing.assert_allclose(sin, expected_sin, atol=4e-7)


@pytest.mark.parametrize("chunk,ranks,data_ranks", [(5, 1, 1), (64, 4, 1), (3, 2, 2), (1000, 8, 4)])
def test_chunks_put_every_token_back(chunk: int, ranks: int, data_ranks: int) -> None:
    x = np.arange(4 * 48 * 3, dtype=np.float32).reshape(4, 48, 3)
    chunks = Chunks(chunk, ranks, data_ranks)
    np.testing.assert_array_equal(chunks.map(lambda part: part * 2, jax.numpy.asarray(x)), x * 2)
    parts = chunks.split(jax.numpy.asarray(x))
    rows_of_a_device = max(1, 4 // data_ranks)
    assert parts.shape[3] * rows_of_a_device <= max(chunk, rows_of_a_device)
