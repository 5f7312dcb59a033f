"""Packed rows of clips and their captions, in both orders, through a whole model, on one device and on a ring of four:
no example sees another, and both train alike.

Shapes: B rows, S sequence, E examples of a row.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import vision_ring
from numpy.typing import NDArray
from vision_ring import RING, ROWS, SEQ_LEN, STEPS, VOCABULARY, begun, keep, look, losses, start, train

from lwm_core.batch import PackedBatch
from lwm_core.builtins.byte_tokens import BytesTokenizer
from lwm_core.protocols import DataContext, FeedRequest
from lwm_core.testing import relative_l2

pytest.importorskip("lwm_data")

APART = "4,1,1,1"
"""Four devices with a row each: sp = 1."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["jax", "torch"], autouse=True)
def framework(request: pytest.FixtureRequest) -> str:
    for module in (f"lwm_{request.param}_ring", {"jax": "flax"}.get(request.param, request.param)):
        pytest.importorskip(module)
    return str(request.param)


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> list[PackedBatch]:
    """A batch a step of the feed ``mix``: clips of one to three frames before and after their texts, and texts alone.

    The first row has examples of all three, each of them on several ranks of a ring.
    """
    from lwm_data.feed import open_mix
    from lwm_data.options import MixOptions

    folder = tmp_path_factory.mktemp("lines")
    random = np.random.default_rng(0)
    lines = [
        {"text": f"clip {i} " * (1 + i % 3), "vision": random.integers(0, 9, 4 * (1 + i % 3)).tolist(), "fields": given}
        for i in range(6)
        for given in ("[text],vision", "[vision],text", "text")
    ]
    (folder / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = MixOptions.model_validate(
        {"sources": {"it": {"kind": "jsonl", "path": "x.jsonl", "codes_per_frame": 4}}, "prefetch": 0}
    )
    mix = open_mix(options, DataContext(BytesTokenizer(), VOCABULARY, 1, folder))
    feed = mix.open(FeedRequest(0, SEQ_LEN, ROWS))
    given = map(feed.batch, range(50))
    first = next(batch for batch in given if kinds(batch) == {"clip learnt", "clip given", "text"})
    return [first, *(next(given) for _ in range(1, STEPS))]


@pytest.fixture(scope="module")
def batch(batches: list[PackedBatch]) -> PackedBatch:
    """The first row."""
    return batches[0].map(lambda array: array[:1])


def kinds(batch: PackedBatch) -> set[str]:
    """What the examples of the first row are."""
    found = set()
    for number in range(1, batch.segment_ids[0].max() + 1):
        own = batch.segment_ids[0] == number
        clip = VOCABULARY.is_vision(batch.targets[0]) & own
        learnt = bool((batch.loss_weights[0] * clip).any())
        found.add("text" if not clip.any() else "clip learnt" if learnt else "clip given")
    return found


@pytest.fixture(scope="module")
def trainer(framework: str) -> Any:
    """A trainer of a framework, on all devices of this process."""
    return begun(framework, "1,1,1,-1", 1)


@pytest.fixture(scope="module")
def on_a_ring(
    framework: str, batches: list[PackedBatch], tmp_path_factory: pytest.TempPathFactory,
    places: Callable[[int], list[dict[str, str]]],
) -> dict[str, NDArray[Any]]:  # fmt: skip
    """What ``vision_ring.py`` keeps, of JAX on four devices of a process or of Torch in four processes."""
    folder = tmp_path_factory.mktemp("ring")
    keep(folder / "rows.npz", batches)
    meshes = (RING, APART) if framework == "jax" else (RING,)
    words = [vision_ring.__file__, framework, str(folder / "rows.npz"), str(folder / "out.npz"), *meshes]
    told = [{"JAX_NUM_CPU_DEVICES": "4"}] if framework == "jax" else places(4)
    processes = [
        subprocess.Popen([sys.executable, *words], env={**os.environ, "OMP_NUM_THREADS": "1", **place},
                         stderr=subprocess.PIPE, text=True)
        for place in told
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(told), said
    return dict(np.load(folder / "out.npz"))


@pytest.fixture(scope="module")
def alone(trainer: Any, batch: PackedBatch) -> dict[str, NDArray[Any]]:
    """What a model on one device sees of the row."""
    return look(trainer, batch)


@pytest.mark.parametrize("where", ["alone", "on_a_ring"])
def test_an_example_changes_no_other_ones_loss(where: str, request: pytest.FixtureRequest) -> None:
    """Bit for bit, whichever of them is disturbed; its own loss changes, which shows that it was."""
    looked = request.getfixturevalue(where)
    before = looked["before"]
    assert len(before) >= 4
    for number, after in enumerate(looked["after"]):
        changed = (after != before).any(axis=1)
        assert changed.tolist() == [other == number for other in range(len(before))], (number, before, after)


@pytest.mark.parametrize("where", ["alone", "on_a_ring"])
def test_without_segments_it_would(where: str, request: pytest.FixtureRequest) -> None:
    """The check above can fail: laid end to end as one document, the first example is seen by all that follow."""
    before, after = request.getfixturevalue(where)["as one"]
    assert before != after


def test_packed_is_padded(trainer: Any, batch: PackedBatch) -> None:
    """Each example's loss is what it is alone in a row."""
    for number, packed in enumerate(losses(trainer, batch), start=1):
        own = np.flatnonzero(batch.segment_ids[0] == number)
        alone = batch.map(lambda array, own=own: np.pad(array[:, own], ((0, 0), (0, SEQ_LEN - len(own)))))
        alone = replace(alone, segment_ids=np.minimum(alone.segment_ids, 1))
        np.testing.assert_allclose(losses(trainer, alone)[0], packed, rtol=1e-5)


@pytest.fixture(scope="module")
def on_one(framework: str, batches: list[PackedBatch], on_a_ring: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """What the training comes to with sp = 1: JAX has a row on each of the four devices, Torch is in one process."""
    if framework == "torch":
        return train(begun("torch", "1,1,1,1"), batches)
    return {name.removeprefix(f"{APART} "): array for name, array in on_a_ring.items() if name.startswith(APART)}


def test_training_on_a_ring_is_training_on_one(
    on_a_ring: dict[str, NDArray[Any]], on_one: dict[str, NDArray[Any]]
) -> None:
    """Ring attention, packed documents, frame blocks and modality weights at once, over steps that rest on each other.

    Losses and gradient norms agree to float32's rounding. Parameters are compared by what they have moved by, which is
    all that is learnt of them, and to 1e-4 of it: Adam divides a gradient by its own size, so that where one is nearly
    nothing, its rounding is what moves the parameter.
    """
    ring = {name.removeprefix(f"{RING} "): array for name, array in on_a_ring.items() if name.startswith(RING)}
    assert ring.keys() == on_one.keys() == {"steps", *start()}
    np.testing.assert_allclose(ring["steps"], on_one["steps"], rtol=1e-5)
    assert on_one["steps"][:, 1:3].min() > 0, "both modalities are learnt"
    for name, first in start().items():
        assert relative_l2(ring[name] - first, on_one[name] - first) < 1e-4, name


def test_a_ring_sees_what_one_device_sees(on_a_ring: dict[str, NDArray[Any]], alone: dict[str, NDArray[Any]]) -> None:
    """Of every example of the row, as it was and disturbed."""
    for name in ("before", "after", "as one"):
        np.testing.assert_allclose(on_a_ring[name], alone[name], rtol=1e-5)
