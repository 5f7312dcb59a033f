"""The trainers ``jax`` and ``torch`` agree: the same parameters, batches and schedule give the same training.

Shapes: B rows, S sequence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lwm_core.batch import PackedBatch, TokenSequence, pack_rows
from lwm_core.model import preset
from lwm_core.protocols import OptimizerSpec, SamplingSpec, Stage, TrainerContext
from lwm_core.rope import RopeSpec
from lwm_core.testing import relative_l2
from lwm_core.vocab import Vocabulary
from lwm_core.weights import read_model_folder, write_model_folder

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
pytest.importorskip("flax")

SEQ_LEN, ROWS, STEPS = 96, 4, 20
ROPE = RopeSpec(1e6)
STAGE = Stage("s", SEQ_LEN, ROPE, STEPS * ROWS * SEQ_LEN, ROWS * SEQ_LEN, lr=2e-3, min_lr=1e-4, lr_schedule="cosine",
              warmup_steps=4, accumulate=2, mesh="1,1,1,-1")  # fmt: skip
MODEL = preset("tiny", Vocabulary(100, 20, 16), hidden_size=64, intermediate_size=96, num_layers=2, qkv_bias=True)


def batches() -> list[PackedBatch]:
    """A batch a step: packed documents that can be learnt, padding, both modalities, unequal weights."""
    random = np.random.default_rng(1)

    def row() -> list[TokenSequence]:
        cuts = sorted(random.choice(np.arange(5, SEQ_LEN), 2, replace=False))
        lengths = (int(cuts[0]), int(cuts[1] - cuts[0]))
        return [TokenSequence((random.integers(120) + 7 * np.arange(n)) % 120, random.random(n)) for n in lengths]

    return [pack_rows([row() for _ in range(ROWS)], SEQ_LEN) for _ in range(STEPS)]


def context(factory: Any, options: Any) -> TrainerContext:
    return TrainerContext(MODEL, factory, options, OptimizerSpec(), {"text": 0.5, "vision": 0.5}, seed=3)


def make_jax() -> Any:
    from lwm_jax_ring.attention.backend import factory
    from lwm_jax_ring.attention.options import AttentionOptions
    from lwm_jax_ring.train.options import TrainerOptions
    from lwm_jax_ring.train.trainer import JaxTrainer

    attention = AttentionOptions(query_chunk=32, key_chunk=32)
    return JaxTrainer(TrainerOptions(loss_chunk=64), context(factory, attention))


def make_torch() -> Any:
    from lwm_torch_ring.attention.backend import factory
    from lwm_torch_ring.attention.options import AttentionOptions
    from lwm_torch_ring.train.options import TrainerOptions
    from lwm_torch_ring.train.trainer import TorchTrainer

    return TorchTrainer(TrainerOptions(device="cpu", loss_chunk=64), context(factory, AttentionOptions(chunk=32)))


MAKERS = {"jax": make_jax, "torch": make_torch}


@pytest.fixture(scope="module")
def start() -> dict[str, np.ndarray]:
    """One trainer's first parameters, which all begin with; biases and norms away from 0 and 1."""
    trainer = make_torch()
    trainer.begin_stage(STAGE)
    random = np.random.default_rng(2)
    return {name: x + 0.02 * random.standard_normal(x.shape).astype("f4") for name, x in trainer.iter_parameters()}


def begun(name: str, start: Any) -> Any:
    trainer = MAKERS[name]()
    trainer.begin_stage(STAGE)
    trainer.load_parameters(start)
    return trainer


def permuted(trainer: Any, batch: PackedBatch) -> PackedBatch:
    order = trainer.layout.permutation(SEQ_LEN)
    return batch.map(lambda array: array[:, order])


def first_gradients(name: str, trainer: Any, batch: PackedBatch) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients by canonical names, of the trainers' own functions."""
    rows = permuted(trainer, batch)
    if name == "torch":
        from lwm_torch_ring.model.sharding import named

        loss = trainer._losses.run(trainer.current.batch(rows, STAGE.accumulate), backward=True)["loss"]
        gradients = {key: p.grad.numpy().copy() for key, p in named(trainer.network)}
        trainer.network.zero_grad()
        return loss, gradients
    from flax import traverse_util

    from lwm_jax_ring.model.names import iter_canonical

    arrays = trainer.device_batch(rows, STAGE.accumulate)
    found = jax.jit(trainer.current.program.gradients, static_argnums=2)(
        trainer.parameters, arrays, trainer.modalities(rows)
    )
    return float(found[1]), dict(iter_canonical(traverse_util.flatten_dict(found[0]), MODEL))


def test_twenty_steps_are_the_same(start: dict[str, np.ndarray]) -> None:
    """First loss and every gradient within 1e-5, the loss of each of 20 steps within 1e-4."""
    trainers = {name: begun(name, start) for name in MAKERS}
    rows = batches()
    (one, ours), (other, theirs) = (first_gradients(name, trainer, rows[0]) for name, trainer in trainers.items())
    assert one == pytest.approx(other, rel=1e-5)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert relative_l2(theirs[name], gradient) < 1e-5, name
    losses: dict[str, list[float]] = {name: [] for name in trainers}
    for step, batch in enumerate(rows):
        told = {name: trainer.step(permuted(trainer, batch), step) for name, trainer in trainers.items()}
        for name, metrics in told.items():
            losses[name].append(metrics["loss"])
        assert told["jax"]["lr"] == told["torch"]["lr"]
        assert told["jax"]["grad_norm"] == pytest.approx(told["torch"]["grad_norm"], rel=1e-3)
    np.testing.assert_allclose(losses["torch"], losses["jax"], rtol=1e-4)
    assert losses["jax"][-1] < 0.95 * losses["jax"][0]


@pytest.mark.parametrize(("here", "there"), [("jax", "torch"), ("torch", "jax")])
def test_parameters_of_one_resume_in_the_other(
    here: str, there: str, start: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """By a model folder: the same evaluation, the same tokens, and the next steps as if nothing had happened."""
    rows = batches()
    trainer, other = begun(here, start), MAKERS[there]()
    for step in range(3):
        trainer.step(permuted(trainer, rows[step]), step)
    write_model_folder(tmp_path / "model", MODEL, ROPE, SEQ_LEN, trainer.iter_parameters(), "float32")
    other.begin_stage(STAGE)
    other.load_parameters(read_model_folder(tmp_path / "model").parameters)
    for name, array in other.iter_parameters():
        np.testing.assert_array_equal(array, dict(trainer.iter_parameters())[name])
    seen, wanted = (one.evaluate(permuted(one, rows[5]))["loss"] for one in (other, trainer))
    assert seen == pytest.approx(wanted, rel=1e-5)
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [27, 18, 28]]
    told, expected = (one.generator().generate(prompts, SamplingSpec(8)) for one in (other, trainer))
    assert told == expected
    ids = [3, 1, 4, 1, 5, 101, 110, 9]
    np.testing.assert_allclose(other.scorer().log_likelihood(ids), trainer.scorer().log_likelihood(ids), rtol=1e-4)
    trainer.begin_stage(STAGE)  # fresh moments, as the other has
    pairs = [[one.step(permuted(one, rows[6 + step]), step)["loss"] for one in (trainer, other)] for step in range(3)]
    for mine, its in pairs:
        assert its == pytest.approx(mine, rel=1e-4)
