"""A packed row of pictures and their captions, in both orders, through a whole model: no example sees another.

Shapes: B = 1 row, S sequence.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lwm_core.batch import PackedBatch
from lwm_core.builtins.byte_tokens import BytesTokenizer
from lwm_core.model import preset
from lwm_core.protocols import DataContext, FeedRequest, OptimizerSpec, Stage, TrainerContext
from lwm_core.rope import RopeSpec
from lwm_core.vocab import Vocabulary

pytest.importorskip("lwm_data")

SEQ_LEN = 192
VOCABULARY = Vocabulary(259, 12, 9)
MODEL = preset("tiny", VOCABULARY, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2)
STAGE = Stage("s", SEQ_LEN, RopeSpec(1e4), SEQ_LEN, SEQ_LEN, 1e-3, 1e-3, mesh="1,1,1,-1")


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> PackedBatch:
    """A row of the feed ``mix`` with at least four examples, among them both orders."""
    from lwm_data.feed import open_mix
    from lwm_data.options import MixOptions

    folder = tmp_path_factory.mktemp("lines")
    random = np.random.default_rng(0)
    lines = [
        {"text": f"picture {i}", "vision": random.integers(0, 9, 4).tolist(), "fields": fields}
        for i in range(6)
        for fields in ("[text],vision", "[vision],text")
    ]
    (folder / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = MixOptions.model_validate(
        {"sources": {"it": {"kind": "jsonl", "path": "x.jsonl", "codes_per_frame": 4}}, "prefetch": 0}
    )
    feed = open_mix(options, DataContext(BytesTokenizer(), VOCABULARY, 1, folder)).open(FeedRequest(0, SEQ_LEN, 1))
    found = next(row for row in map(feed.batch, range(50)) if len(modalities(row)) >= 4 and both(row))
    return found


def modalities(batch: PackedBatch) -> list[bool]:
    """For each example whether its clip is learnt."""
    learnt = (batch.loss_weights > 0) & VOCABULARY.is_vision(batch.targets)
    return [bool(learnt[batch.segment_ids == n].any()) for n in range(1, batch.segment_ids.max() + 1)]


def both(batch: PackedBatch) -> bool:
    return set(modalities(batch)) == {False, True}


def jax_trainer(context: Any) -> Any:
    pytest.importorskip("flax")
    from lwm_jax_ring.attention.backend import factory
    from lwm_jax_ring.attention.options import AttentionOptions
    from lwm_jax_ring.train.options import TrainerOptions
    from lwm_jax_ring.train.trainer import JaxTrainer

    options = AttentionOptions(query_chunk=32, key_chunk=32)
    return JaxTrainer(TrainerOptions(loss_chunk=64), context(factory, options))


def torch_trainer(context: Any) -> Any:
    pytest.importorskip("torch")
    from lwm_torch_ring.attention.backend import factory
    from lwm_torch_ring.attention.options import AttentionOptions
    from lwm_torch_ring.train.options import TrainerOptions
    from lwm_torch_ring.train.trainer import TorchTrainer

    return TorchTrainer(TrainerOptions(device="cpu", loss_chunk=64), context(factory, AttentionOptions(chunk=32)))


@pytest.fixture(scope="module", params=["lwm_jax_ring", "lwm_torch_ring"])
def trainer(request: pytest.FixtureRequest) -> Any:
    """A trainer of a framework, with parameters that let every token matter."""
    pytest.importorskip(request.param)
    make = jax_trainer if request.param == "lwm_jax_ring" else torch_trainer
    made = make(lambda factory, options: TrainerContext(
        MODEL, factory, options, OptimizerSpec(), {"text": 0.5, "vision": 0.5}, seed=3
    ))  # fmt: skip
    made.begin_stage(STAGE)
    random = np.random.default_rng(2)
    made.load_parameters(
        {name: x + 0.1 * random.standard_normal(x.shape).astype("f4") for name, x in made.iter_parameters()}
    )
    return made


def losses(trainer: Any, batch: PackedBatch) -> list[dict[str, float]]:
    """The loss of each example of the row: the weights of all others are 0."""
    order = trainer.layout.permutation(SEQ_LEN)
    found = []
    for number in range(1, batch.segment_ids.max() + 1):
        own = np.where(batch.segment_ids == number, batch.loss_weights, 0)
        told = trainer.evaluate(replace(batch, loss_weights=own).map(lambda array: array[:, order]))
        found.append({name: told[name] for name in ("loss", "loss_text", "loss_vision")})
    return found


def disturbed(batch: PackedBatch, number: int) -> PackedBatch:
    """The row with other tokens in one example, text for text and code for code."""
    random = np.random.default_rng(number)
    text = random.integers(0, 256, batch.shape)
    codes = VOCABULARY.vision_ids(random.integers(0, 9, batch.shape))
    other = np.where(VOCABULARY.is_vision(batch.tokens), codes, text)
    return replace(batch, tokens=np.where(batch.segment_ids == number, other, batch.tokens))


def test_an_example_changes_no_other_ones_loss(trainer: Any, batch: PackedBatch) -> None:
    """Bit for bit, whichever of them is disturbed; its own loss changes, which shows that it was."""
    before = losses(trainer, batch)
    for number in range(1, len(before) + 1):
        after = losses(trainer, disturbed(batch, number))
        for other, (was, now) in enumerate(zip(before, after, strict=True), start=1):
            assert (was == now) == (other != number), f"example {number} was disturbed, and {other} went {was} → {now}"


def test_without_segments_it_would(trainer: Any, batch: PackedBatch) -> None:
    """The check above can fail: laid end to end as one document, the first example is seen by all that follow."""

    def as_one(row: PackedBatch) -> list[float]:
        order = trainer.layout.permutation(SEQ_LEN)
        last = row.segment_ids == row.segment_ids.max()
        weights = np.where(last, row.loss_weights, 0)
        merged = replace(row, segment_ids=np.minimum(row.segment_ids, 1), loss_weights=weights)
        return [trainer.evaluate(merged.map(lambda array: array[:, order]))["loss"]]

    assert as_one(batch) != as_one(disturbed(batch, 1))


def test_packed_is_padded(trainer: Any, batch: PackedBatch) -> None:
    """Each example's loss is what it is alone in a row."""
    for number, packed in enumerate(losses(trainer, batch), start=1):
        own = np.flatnonzero(batch.segment_ids[0] == number)
        alone = batch.map(lambda array, own=own: np.pad(array[:, own], ((0, 0), (0, SEQ_LEN - len(own)))))
        alone = replace(alone, segment_ids=np.minimum(alone.segment_ids, 1))
        assert losses(trainer, alone)[0] == pytest.approx(packed, rel=1e-5)
