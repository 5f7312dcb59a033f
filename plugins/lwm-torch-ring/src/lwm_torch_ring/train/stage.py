"""What a stage comes to on the ranks: their meshes, attention, and this rank's part of a batch.

Shapes: A micro-batches, B rows of a data rank in one, S sequence, C = S / sp tokens of a sequence shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lwm_core.attention_cost import AttentionShape
from lwm_core.batch import PackedBatch
from lwm_core.errors import ShapeError
from lwm_core.mesh import data_ranks, resolve_mesh
from lwm_core.protocols import AttentionAxes, AttentionChoice, Stage, TrainerContext
from lwm_torch_ring.model.llama import Compute
from lwm_torch_ring.model.rope import RopeTables, rope_tables
from lwm_torch_ring.model.sharding import NEAREST_LAST, Meshes, check_tensor_parallel, make_meshes
from lwm_torch_ring.train.options import TrainerOptions

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Place:
    """Where a rank stands: its coordinates on the axes ``dp, fsdp, tp, sp`` of some sizes."""

    sizes: Mapping[str, int]
    rank: int

    @property
    def at(self) -> dict[str, int]:
        """The coordinate on each axis."""
        shape = [self.sizes[axis] for axis in NEAREST_LAST]
        return dict(zip(NEAREST_LAST, map(int, np.unravel_index(self.rank, shape)), strict=True))

    @property
    def data_rank(self) -> tuple[int, int]:
        """(rank, world) of the rows that it trains on."""
        return self.at["dp"] * self.sizes["fsdp"] + self.at["fsdp"], data_ranks(self.sizes)

    def tokens(self, array: np.ndarray) -> np.ndarray:
        """Its sequence shard ``[B,C]`` of rows ``[B,S]`` in the layout's order."""
        part: np.ndarray = np.split(array, self.sizes["sp"], axis=-1)[self.at["sp"]]
        return part


@dataclass(frozen=True)
class StageProgram:
    """A stage on the ranks.

    Args:
        stage: what is trained.
        place: this rank's.
        meshes: of all ranks.
        attention: how attention runs, and why.
        backend: attention on the mesh.
        rope: tables up to the stage's length.
        compute: how the network runs.
        device: this rank's.
    """

    stage: Stage
    place: Place
    meshes: Meshes
    attention: AttentionChoice
    backend: Any
    rope: RopeTables
    compute: Compute
    device: torch.device

    def batch(self, batch: PackedBatch, accumulate: int = 1) -> list[dict[str, Tensor]]:
        """This rank's tokens ``[B,C]`` of its data rank's rows ``[A·B,S]``, a dict a micro-batch.

        Raises:
            ShapeError: rows of another length, or that do not divide into the micro-batches.
        """
        rows, length = batch.shape
        if length != self.stage.seq_len:
            raise ShapeError(
                f"trainer 'torch': rows of {length} tokens; stage {self.stage.name!r} has seq_len {self.stage.seq_len}"
            )
        if rows % accumulate:
            raise ShapeError(f"trainer 'torch': {rows} rows do not divide into {accumulate} micro-batches")
        parts = {
            field.name: np.split(self.place.tokens(getattr(batch, field.name)), accumulate) for field in fields(batch)
        }
        return [
            {name: torch.tensor(part[a], device=self.device) for name, part in parts.items()} for a in range(accumulate)
        ]


def stage_program(
    options: TrainerOptions, context: TrainerContext, stage: Stage, device: torch.device, rank: int, world: int,
    known: dict[tuple[int, ...], Meshes],
) -> StageProgram:  # fmt: skip
    """Lay ``stage`` out on the ranks; every rank calls it at the same time.

    Args:
        known: meshes that there are already, by their sizes; a new one is added, for groups of ranks stay for good.

    Raises:
        ShapeError: the mesh does not fit the ranks, or rows, heads or tokens do not divide over it.
        UnsupportedError: the attention's options do not fit the devices.
    """
    try:
        sizes = resolve_mesh(stage.mesh, world)
    except ShapeError as error:
        how = " (a process each: start them with torchrun)" if world == 1 else ""
        raise ShapeError(f"stage {stage.name!r}: {error}{how}") from None
    micro, model = stage.rows // stage.accumulate, context.model
    if micro % data_ranks(sizes):
        raise ShapeError(
            f"stage {stage.name!r}: {micro} rows a micro-batch do not divide over dp x fsdp = {data_ranks(sizes)}; "
            "change batch_tokens, accumulate or the mesh"
        )
    check_tensor_parallel(model, sizes, stage.seq_len, options.shard_parameters)
    place, dtype = Place(sizes, rank), DTYPES[options.compute_dtype]
    key = tuple(sizes[axis] for axis in NEAREST_LAST)
    meshes = known[key] if key in known else known.setdefault(key, make_meshes(sizes, options.shard_parameters, device))
    shape = AttentionShape(
        stage.seq_len, model.num_heads, model.num_kv_heads, model.head_dim, micro // data_ranks(sizes), dtype.itemsize
    )
    attention = context.attention.resolve(context.attention_options, shape, meshes.axes, AttentionAxes())
    return StageProgram(
        stage=stage,
        place=place,
        meshes=meshes,
        attention=attention,
        backend=context.attention.build(attention.options, meshes.axes, AttentionAxes(), stage.seq_len),
        rope=rope_tables(stage.rope, model.head_dim, stage.seq_len, device),
        compute=Compute(dtype, options.remat, options.token_chunk, meshes.tensor_parallel),
        device=device,
    )
