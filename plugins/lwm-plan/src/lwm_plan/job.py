"""What is planned: a model and how its trainer computes, apart from stage and machine.

Shapes: T a device's tokens of a micro-batch, S sequence, H query heads, K key-value heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any, cast

from lwm_core.attention_cost import AttentionShape, repeated_kv_heads
from lwm_core.errors import ShapeError, UnsupportedError
from lwm_core.launch import first_misfit
from lwm_core.layout import LayoutKind, SequenceLayout
from lwm_core.mesh import data_ranks, resolve_mesh
from lwm_core.model import ModelConfig, canonical_shapes
from lwm_core.protocols import Stage

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
BACK = ("o_proj", "down_proj")
"""Matrices that lead back into the residual stream: ``tp`` cuts what goes in, of others what comes out."""


@dataclass(frozen=True)
class Job:
    """A model and how it is computed.

    Args:
        model: its shape.
        trainer: the trainer's name.
        element_bytes: of an activation.
        remat: what a layer keeps for its backward pass.
        loss_chunk: tokens of a device whose logits exist at a time.
        token_chunk: tokens of a device in projections and feed-forward at a time; none: all.
        shard_parameters: axes that share parameters out beside ``tp``.
        strategy: of attention; ``auto`` for the cheapest.
        layout: how tokens are dealt to ranks.
        inner: of ``usp``; none: sp's largest divisor up to its root.
        document: mean tokens of a document; none: one fills the row.
    """

    model: ModelConfig
    trainer: str = "jax"
    element_bytes: int = 2
    remat: str = "attention"
    loss_chunk: int = 2048
    token_chunk: int | None = 8192
    shard_parameters: tuple[str, ...] = ("fsdp", "sp")
    strategy: str = "auto"
    layout: LayoutKind = "zigzag"
    inner: int | None = None
    document: int | None = None

    @classmethod
    def from_options(cls, model: ModelConfig, name: str, trainer: Any, attention: Any) -> Job:
        """From the validated options of a trainer and an attention.

        Raises:
            UnsupportedError: they do not say how memory is laid out.
        """
        try:
            return cls(
                model, name, ELEMENT_BYTES[trainer.compute_dtype], trainer.remat, trainer.loss_chunk,
                trainer.token_chunk, tuple(trainer.shard_parameters), attention.strategy,
                cast(LayoutKind, attention.layout), attention.inner, getattr(attention, "document", None),
            )  # fmt: skip
        except AttributeError as error:
            raise UnsupportedError(
                f"plan: trainer {name!r} or its attention has no option {error.name!r}, from which memory is counted; "
                "use the trainer jax or torch"
            ) from None

    def matrix_elements(self, tp: int = 1) -> dict[str, int]:
        """Elements of one layer's matrices by their last name (``q_proj`` …) on one of ``tp`` devices.

        What ``tp`` does not divide every device has, and multiplies, whole.
        """
        return _matrix_elements(self.model, tp)


@lru_cache(maxsize=32)
def _matrix_elements(model: ModelConfig, tp: int) -> dict[str, int]:
    found = {}
    for full, shape in canonical_shapes(model).items():
        if full.startswith("model.layers.0.") and len(shape) == 2:
            name = full.split(".")[-2]
            cut = shape[1] if name in BACK else shape[0]
            found[name] = shape[0] * shape[1] // (tp if cut % tp == 0 else 1)
    return found


def part(size: int, ranks: int) -> int:
    """A rank's part of a dimension; all of it where it does not divide."""
    return size if size % ranks else size // ranks


@dataclass(frozen=True)
class Placed:
    """A stage's step on a mesh.

    Args:
        job: what is computed.
        stage: which stage.
        sizes: of the four axes.
    """

    job: Job
    stage: Stage
    sizes: Mapping[str, int]

    @cached_property
    def devices(self) -> int:
        """All of them."""
        return self.sizes["dp"] * self.sizes["fsdp"] * self.sizes["tp"] * self.sizes["sp"]

    @cached_property
    def rows(self) -> int:
        """Rows of a micro-batch on a device."""
        return self.stage.rows // self.stage.accumulate // data_ranks(self.sizes)

    @cached_property
    def tokens(self) -> int:
        """T: a micro-batch's tokens on a device; ``tp`` devices have the same."""
        return self.rows * self.stage.seq_len // self.sizes["sp"]

    @cached_property
    def sharing(self) -> int:
        """Devices beside ``tp`` that share one copy of the parameters out."""
        count = 1
        for axis in self.job.shard_parameters:
            count *= self.sizes[axis]
        return count

    @cached_property
    def shape(self) -> AttentionShape:
        """Attention of one layer and one tensor-parallel rank; key-value heads are repeated until each has one."""
        model, tp = self.job.model, self.sizes["tp"]
        return AttentionShape(
            seq_len=self.stage.seq_len,
            heads=model.num_heads // tp,
            kv_heads=repeated_kv_heads(model.num_heads, model.num_kv_heads, tp) // tp,
            head_dim=model.head_dim, rows=self.rows, element_bytes=self.job.element_bytes, document=self.job.document,
        )  # fmt: skip


@lru_cache(maxsize=4096)
def _sizes(mesh: str, devices: int) -> Mapping[str, int] | None:
    """Of a mesh on so many devices; none where it does not fit them. A search asks of each many times."""
    try:
        return MappingProxyType(resolve_mesh(mesh, devices))
    except ValueError:  # ShapeError is one
        return None


def place(job: Job, stage: Stage, devices: int, mesh: str | None = None) -> Placed:
    """``stage`` on ``devices``, laid out by its own mesh or by ``mesh``.

    Raises:
        ShapeError: the mesh, the rows, the heads or the length do not divide.
    """
    text = mesh or stage.mesh
    sizes = _sizes(text, devices)
    if sizes is None or (stage.rows // stage.accumulate) % data_ranks(sizes):
        misfit = first_misfit([replace(stage, mesh=text)], devices)
        assert misfit is not None
        raise ShapeError(misfit[1])
    try:
        repeated_kv_heads(job.model.num_heads, job.model.num_kv_heads, sizes["tp"])
    except UnsupportedError as error:
        raise ShapeError(f"mesh {text!r}: {error}") from None
    # Whoever exchanges all heads has whole sequences, in natural order.
    layout = "contiguous" if job.strategy == "ulysses" else job.layout
    SequenceLayout(layout, sizes["sp"]).check(stage.seq_len)
    return Placed(job, stage, sizes)
