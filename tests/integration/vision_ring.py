"""Packed rows of clips and texts through a whole model: what the tests of it share, and what runs them on a ring.

``python vision_ring.py jax|torch ROWS.npz OUT.npz MESH…`` trains and looks on each MESH, and keeps what came out. JAX's
devices and Torch's ranks are told by the environment.

Shapes: B rows, S sequence, E examples of a row.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lwm_core.batch import PackedBatch
from lwm_core.model import canonical_shapes, preset
from lwm_core.protocols import OptimizerSpec, Stage, TrainerContext
from lwm_core.rope import RopeSpec
from lwm_core.vocab import Vocabulary

SEQ_LEN, STEPS, ROWS = 192, 3, 4
VOCABULARY = Vocabulary(259, 12, 9)
MODEL = preset("tiny", VOCABULARY, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2)
ALPHAS = {"text": 0.5, "vision": 0.25}
RING = "1,1,1,4"
LAYOUTS = {"jax": "zigzag", "torch": "striped"}
"""Of the two, each in one trainer."""


def make_jax() -> Any:
    from lwm_jax_ring.attention.backend import factory
    from lwm_jax_ring.attention.options import AttentionOptions
    from lwm_jax_ring.train.options import TrainerOptions
    from lwm_jax_ring.train.trainer import JaxTrainer

    options = AttentionOptions(query_chunk=32, key_chunk=32, layout=LAYOUTS["jax"])  # type: ignore[arg-type]
    return JaxTrainer(TrainerOptions(loss_chunk=64), _context(factory, options))


def make_torch() -> Any:
    from lwm_torch_ring.attention.backend import factory
    from lwm_torch_ring.attention.options import AttentionOptions
    from lwm_torch_ring.train.options import TrainerOptions
    from lwm_torch_ring.train.trainer import TorchTrainer

    options = AttentionOptions(chunk=32, layout=LAYOUTS["torch"])  # type: ignore[arg-type]
    return TorchTrainer(TrainerOptions(device="cpu", loss_chunk=64), _context(factory, options))


MAKERS: dict[str, Callable[[], Any]] = {"jax": make_jax, "torch": make_torch}


def _context(factory: Any, options: Any) -> TrainerContext:
    return TrainerContext(MODEL, factory, options, OptimizerSpec(), ALPHAS, seed=3)


def begun(framework: str, mesh: str, rows: int = ROWS) -> Any:
    """A trainer whose stage has begun, with the same parameters in every framework, that let every token matter."""
    trainer = MAKERS[framework]()
    tokens = rows * SEQ_LEN
    trainer.begin_stage(Stage("s", SEQ_LEN, RopeSpec(1e4), STEPS * tokens, tokens, 1e-3, 1e-3, mesh=mesh))
    trainer.load_parameters(start())
    return trainer


def start() -> dict[str, NDArray[np.float32]]:
    """Parameters of this model, norms about 1."""
    random = np.random.default_rng(2)
    return {
        name: (0.1 * random.standard_normal(shape) + name.endswith("norm.weight")).astype(np.float32)
        for name, shape in canonical_shapes(MODEL).items()
    }


def permuted(trainer: Any, batch: PackedBatch) -> PackedBatch:
    """The trainer's data rank's rows, in its layout."""
    order = trainer.layout.permutation(SEQ_LEN)
    rank, world = trainer.data_rank(trainer.stage)
    size = batch.shape[0] // world
    return batch.map(lambda array: array[rank * size : (rank + 1) * size, order])


def losses(trainer: Any, batch: PackedBatch) -> NDArray[np.float64]:
    """``[E, 3]``: loss, and that of text and of vision, of each example of a row: the weights of all others are 0."""
    found = []
    for number in range(1, batch.segment_ids.max() + 1):
        own = np.where(batch.segment_ids == number, batch.loss_weights, 0)
        told = trainer.evaluate(permuted(trainer, replace(batch, loss_weights=own)))
        found.append([told[name] for name in ("loss", "loss_text", "loss_vision")])
    return np.array(found)


def disturbed(batch: PackedBatch, number: int) -> PackedBatch:
    """The row with other tokens in one example, text for text and code for code."""
    random = np.random.default_rng(number)
    text = random.integers(0, 256, SEQ_LEN)
    codes = VOCABULARY.vision_ids(random.integers(0, 9, SEQ_LEN))
    other = np.where(VOCABULARY.is_vision(batch.tokens), codes, text)
    return replace(batch, tokens=np.where(batch.segment_ids == number, other, batch.tokens))


def as_one(trainer: Any, batch: PackedBatch) -> float:
    """The loss of the last example where all are one document."""
    last = batch.segment_ids == batch.segment_ids.max()
    weights = np.where(last, batch.loss_weights, 0)
    merged = replace(batch, segment_ids=np.minimum(batch.segment_ids, 1), loss_weights=weights)
    return float(trainer.evaluate(permuted(trainer, merged))["loss"])


def look(trainer: Any, batch: PackedBatch) -> dict[str, NDArray[Any]]:
    """What disturbing an example of a row does.

    Returns:
        ``before [E, 3]``, the :func:`losses`, ``after [E, E, 3]``, those after each of the examples was disturbed, and
        ``as one [2]``, :func:`as_one` before and after the first was.
    """
    rows = [disturbed(batch, number) for number in range(1, batch.segment_ids.max() + 1)]
    return {
        "before": losses(trainer, batch),
        "after": np.stack([losses(trainer, row) for row in rows]),
        "as one": np.array([as_one(trainer, row) for row in (batch, rows[0])]),
    }


def train(trainer: Any, batches: list[PackedBatch]) -> dict[str, NDArray[Any]]:
    """``steps [T, 4]``: losses and gradient norm of a step a batch; and the parameters after them, by name."""
    told = [trainer.step(permuted(trainer, batch), step) for step, batch in enumerate(batches)]
    steps = [[one[name] for name in ("loss", "loss_text", "loss_vision", "grad_norm")] for one in told]
    return {"steps": np.array(steps), **dict(trainer.iter_parameters())}


def keep(path: Path, batches: list[PackedBatch]) -> None:
    """Write batches of one shape for :func:`kept`."""
    names = [field.name for field in fields(PackedBatch)]
    np.savez(path, **{name: np.stack([getattr(batch, name) for batch in batches]) for name in names})


def kept(path: Path) -> list[PackedBatch]:
    """What :func:`keep` wrote."""
    arrays = dict(np.load(path))
    return [PackedBatch(**dict(zip(arrays, rows, strict=True))) for rows in zip(*arrays.values(), strict=True)]


def only_row(batch: PackedBatch) -> PackedBatch:
    """``[ROWS, S]``: the first row, and padding."""
    return batch.map(lambda array: np.pad(array[:1], ((0, ROWS - 1), (0, 0))))


def main(framework: str, rows: str, out: str, *meshes: str) -> None:
    batches, told = kept(Path(rows)), {}
    for mesh in meshes:
        trainer = begun(framework, mesh)
        if mesh == RING:
            told |= look(trainer, only_row(batches[0]))
        told |= {f"{mesh} {name}": array for name, array in train(trainer, batches).items()}
    if trainer.processes.rank == 0:
        np.savez(out, **told)


if __name__ == "__main__":
    main(*sys.argv[1:])
