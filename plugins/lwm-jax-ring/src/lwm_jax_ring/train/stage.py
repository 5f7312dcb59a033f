"""What a stage comes to on given devices: mesh, attention and the compiled step. No array is made here, so that the
devices may be those of a topology that is not at hand.

Shapes: A micro-batches, B rows of one, S sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lwm_core.attention_cost import AttentionShape
from lwm_core.batch import PackedBatch
from lwm_core.errors import ShapeError
from lwm_core.mesh import MESH_AXES, data_ranks, resolve_mesh
from lwm_core.protocols import AttentionAxes, AttentionChoice, Stage, TrainerContext
from lwm_jax_ring.model.llama import Chunks, Compute
from lwm_jax_ring.model.network import Network
from lwm_jax_ring.model.rope import rope_tables
from lwm_jax_ring.model.sharding import ROWS, gathered, parameter_sharding, stream_sharding
from lwm_jax_ring.train.optimizer import state_shardings
from lwm_jax_ring.train.options import TrainerOptions
from lwm_jax_ring.train.step import MASK, Program


@dataclass(frozen=True)
class StageProgram:
    """A stage on a mesh.

    Args:
        stage: what is trained.
        mesh: axes ``dp, fsdp, tp, sp``.
        attention: how attention runs, and why.
        backend: attention on the mesh.
        program: the pure functions of a step.
        shardings: where each parameter lies.
    """

    stage: Stage
    mesh: Mesh
    attention: AttentionChoice
    backend: Any
    program: Program
    shardings: Any

    @cached_property
    def step(self) -> Any:
        """The jitted step: (parameters, state, batch ``[A,B,S]``, lr, modalities); the first two are given away."""
        # Left open, a compiler may give parameters back laid out otherwise, and the next step would be compiled anew.
        state = state_shardings(self.program.optimizer, self.shardings, self.mesh)
        return jax.jit(
            self.program.step, static_argnums=4, donate_argnums=(0, 1), out_shardings=(self.shardings, state, None)
        )

    @cached_property
    def evaluate(self) -> Any:
        """The jitted losses: (parameters, batch ``[B,S]``, modalities)."""
        return jax.jit(self.program.evaluate, static_argnums=2)

    def batch_sharding(self, accumulate: bool) -> NamedSharding:
        """Of an array of a batch, ``[A,B,S]`` with ``accumulate``, else ``[B,S]``."""
        return NamedSharding(self.mesh, P(None, ROWS, "sp") if accumulate else P(ROWS, "sp"))

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of a step's batch ``[A,B,S]``, laid out on the mesh."""
        stage, sharding = self.stage, self.batch_sharding(accumulate=True)
        shape = (stage.accumulate, stage.rows // stage.accumulate, stage.seq_len)
        return {
            field.name: jax.ShapeDtypeStruct(
                shape, jnp.float32 if field.name == "loss_weights" else jnp.int32, sharding=sharding
            )
            for field in fields(PackedBatch)
        }


def stage_program(
    network: Network, options: TrainerOptions, context: TrainerContext, stage: Stage, devices: Sequence[jax.Device]
) -> StageProgram:
    """Lay ``stage`` out on ``devices``.

    Raises:
        ShapeError: the mesh does not fit the devices, or the rows do not divide over dp × fsdp.
        UnsupportedError: the attention's options do not fit the devices.
    """
    sizes = resolve_mesh(stage.mesh, len(devices))
    micro = stage.rows // stage.accumulate
    if micro % data_ranks(sizes):
        raise ShapeError(
            f"stage {stage.name!r}: {micro} rows a micro-batch do not divide over dp x fsdp = {data_ranks(sizes)}; "
            "change batch_tokens, accumulate or the mesh"
        )
    mesh = make_mesh(sizes, devices)
    model, dtype = network.config, jnp.dtype(options.compute_dtype)
    # A stage does not say how long its documents are: they are known with the first batch. Options may tell.
    shape = AttentionShape(
        seq_len=stage.seq_len,
        heads=model.num_heads,
        kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        rows=micro // data_ranks(sizes),
        element_bytes=dtype.itemsize,
        mask=MASK,
    )
    attention = context.attention.resolve(context.attention_options, shape, mesh, AttentionAxes())
    backend = context.attention.build(attention.options, mesh, AttentionAxes(), stage.seq_len)
    stream = stream_sharding(mesh, model.hidden_size).spec
    table = NamedSharding(mesh, P(None, stream[-1]))

    def constrain(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, stream_sharding(mesh, model.hidden_size, x.ndim))

    def lay_head(rows: jax.Array) -> jax.Array:
        sharding = parameter_sharding(("lm_head",), rows.shape, mesh, tuple(options.shard_parameters))
        return jax.lax.with_sharding_constraint(rows, sharding)

    program = Program(
        merge=network.merge,
        attend=backend.attend,
        vocabulary=model.vocabulary,
        alphas=dict(context.loss_weights),
        optimizer=context.optimizer,
        rope=rope_tables(stage.rope, model.head_dim, stage.seq_len),
        compute=Compute(
            dtype=dtype,
            remat=options.remat,
            constrain=constrain,
            gather_layer=gathered(network.shapes["layers"], mesh, tuple(options.shard_parameters)),
            gather_table=lambda x: jax.lax.with_sharding_constraint(x, table),
            chunks=_chunks(options.token_chunk, sizes) if options.token_chunk else None,
        ),
        loss_chunks=_chunks(options.loss_chunk, sizes),
        lay_head=lay_head,
    )
    return StageProgram(stage, mesh, attention, backend, program, network.shardings(mesh, options.shard_parameters))


def fed_rows(stage: Stage, devices: Sequence[jax.Device], process: int) -> tuple[int, int]:
    """(rank, world) of the rows that ``process`` feeds, where each feeds what its own devices train on.

    Raises:
        ShapeError: the mesh does not fit the devices, or deals unequal or overlapping rows to processes.
    """
    sizes = resolve_mesh(stage.mesh, len(devices))
    ranks = data_ranks(sizes)
    rows = make_mesh(sizes, devices).devices.reshape(ranks, -1)
    owners = [{device.process_index for device in row} for row in rows]
    held = {one: [i for i, own in enumerate(owners) if one in own] for one in sorted(set().union(*owners))}
    count = len(held[process])
    for one, of in held.items():
        if len(of) != count or of != list(range(of[0], of[0] + count)) or of[0] % count:
            raise ShapeError(
                f"stage {stage.name!r}: mesh {stage.mesh!r} deals rows to {len(held)} processes unevenly (rank {one} "
                f"holds parts {of} of {ranks}); let dp x fsdp divide the processes, or be a multiple of them"
            )
    return held[process][0] // count, ranks // count


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device]) -> Mesh:
    """The devices as a mesh of the four axes; those of a TPU so that neighbours of an axis are so in its torus."""
    shape = [sizes[axis] for axis in MESH_AXES]
    if devices[0].platform != "tpu":
        return Mesh(np.array(devices).reshape(shape), MESH_AXES)
    return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), MESH_AXES)


def _chunks(chunk: int, sizes: Mapping[str, int]) -> Chunks:
    return Chunks(chunk, sizes["sp"], data_ranks(sizes))
