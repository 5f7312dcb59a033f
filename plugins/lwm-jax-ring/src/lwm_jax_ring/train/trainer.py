"""The trainer ``jax``: parameters and optimizer on a mesh, one compiled step a stage.

Shapes: A micro-batches, B rows of one, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx, traverse_util
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lwm_core.attention_cost import AttentionShape
from lwm_core.batch import PackedBatch
from lwm_core.errors import LwmError, ShapeError
from lwm_core.layout import SequenceLayout
from lwm_core.mesh import MESH_AXES, data_ranks, resolve_mesh
from lwm_core.protocols import AttentionAxes, AttentionChoice, Metrics, Stage, TrainerContext
from lwm_jax_ring.devices import ensure_devices, peak_flops
from lwm_jax_ring.model.llama import Chunks, Compute, Llama
from lwm_jax_ring.model.names import iter_canonical, stack_canonical
from lwm_jax_ring.model.rope import rope_tables
from lwm_jax_ring.model.sharding import ROWS, parameter_sharding, stream_sharding
from lwm_jax_ring.train import checkpoint
from lwm_jax_ring.train.optimizer import fresh_state
from lwm_jax_ring.train.options import TrainerOptions
from lwm_jax_ring.train.step import Arrays, Program


class JaxTrainer:
    """See ``lwm_core.protocols.Trainer``."""

    def __init__(self, options: TrainerOptions, context: TrainerContext) -> None:
        if options.host_devices is not None:
            ensure_devices(options.host_devices)
        self.options, self.context = options, context
        abstract = nnx.eval_shape(lambda: Llama(context.model, nnx.Rngs(params=context.seed)))
        self._graph, self._abstract = nnx.split(abstract)
        self.parameters: Any = None
        self._state: Any = None
        self._stage: Stage | None = None

    # -- the model -----------------------------------------------------------------------------------------------

    def merge(self, parameters: Any) -> Llama:
        """The network over a nested dict of arrays; cheap, and meant to be called inside jit."""
        state = jax.tree.map(lambda x: x, self._abstract)
        nnx.replace_by_pure_dict(state, parameters)
        return nnx.merge(self._graph, state)

    def _initial(self) -> Any:
        return nnx.to_pure_dict(nnx.state(Llama(self.context.model, nnx.Rngs(params=self.context.seed))))

    def _shardings(self) -> Any:
        flat = traverse_util.flatten_dict(nnx.to_pure_dict(self._abstract))
        over = tuple(self.options.shard_parameters)
        return traverse_util.unflatten_dict(
            {path: parameter_sharding(path, leaf.shape, self.mesh, over) for path, leaf in flat.items()}
        )

    # -- stages --------------------------------------------------------------------------------------------------

    @property
    def stage(self) -> Stage:
        """The stage in hand."""
        if self._stage is None:
            raise LwmError("trainer 'jax': begin_stage must come first; no stage has been begun")
        return self._stage

    def begin_stage(self, stage: Stage) -> None:
        """Take up ``stage``: its mesh, length and RoPE; fresh moments; the parameters stay.

        Raises:
            ShapeError: the mesh does not fit the devices, or the rows do not divide over dp × fsdp.
        """
        sizes = resolve_mesh(stage.mesh, len(jax.devices()))
        micro = stage.rows // stage.accumulate
        if micro % data_ranks(sizes):
            raise ShapeError(
                f"stage {stage.name!r}: {micro} rows a micro-batch do not divide over dp x fsdp = "
                f"{data_ranks(sizes)}; change batch_tokens, accumulate or the mesh"
            )
        mesh = Mesh(np.array(jax.devices()).reshape([sizes[axis] for axis in MESH_AXES]), MESH_AXES)
        if self._stage is not None and mesh != self.mesh:
            self.__dict__.pop("_generator", None)  # its programs are compiled for the old mesh
        self.attention = self._resolve_attention(stage, mesh, micro // data_ranks(sizes))
        backend = self.context.attention.build(self.attention.options, mesh, AttentionAxes(), stage.seq_len)
        self._stage, self.mesh, self._backend = stage, mesh, backend
        shardings = self._shardings()
        if self.parameters is None:
            self.parameters = jax.jit(self._initial, out_shardings=shardings)()
        else:
            self.parameters = jax.tree.map(jax.device_put, self.parameters, shardings)
        self._state = fresh_state(self.context.optimizer, self.parameters, mesh)
        stream, whole = stream_sharding(mesh), NamedSharding(mesh, P())
        self.program = Program(
            merge=self.merge,
            attend=backend.attend,
            vocabulary=self.context.model.vocabulary,
            alphas=dict(self.context.loss_weights),
            optimizer=self.context.optimizer,
            rope=rope_tables(stage.rope, self.context.model.head_dim, stage.seq_len),
            compute=Compute(
                dtype=jnp.dtype(self.options.compute_dtype),
                remat=self.options.remat,
                constrain=lambda x: jax.lax.with_sharding_constraint(x, stream),
                gather_table=lambda x: jax.lax.with_sharding_constraint(x, whole),
                mlp_chunks=self._chunks(self.options.mlp_chunk, sizes) if self.options.mlp_chunk else None,
            ),
            loss_chunks=self._chunks(self.options.loss_chunk, sizes),
        )
        self.compiled_step = jax.jit(self.program.step, static_argnums=4, donate_argnums=(0, 1))
        self._evaluate = jax.jit(self.program.evaluate, static_argnums=2)

    def _resolve_attention(self, stage: Stage, mesh: Mesh, rows: int) -> AttentionChoice:
        model = self.context.model
        shape = AttentionShape(
            stage.seq_len, model.num_heads, model.num_kv_heads, model.head_dim, rows,
            jnp.dtype(self.options.compute_dtype).itemsize,
        )  # fmt: skip
        return self.context.attention.resolve(self.context.attention_options, shape, mesh, AttentionAxes())

    def choices(self) -> Sequence[str]:
        """How the attention's strategy was chosen, where it was left open."""
        return [f"attention {reason}" for reason in self.attention.reasons]

    @staticmethod
    def _chunks(chunk: int, sizes: Mapping[str, int]) -> Chunks:
        return Chunks(chunk, sizes["sp"], data_ranks(sizes))

    @property
    def layout(self) -> SequenceLayout:
        """The layout that batches of the stage must be permuted to."""
        layout: SequenceLayout = self._backend.layout
        return layout

    @property
    def data_rank(self) -> tuple[int, int]:
        """This process feeds every row; JAX deals them to the devices."""
        return jax.process_index(), jax.process_count()

    # -- steps ---------------------------------------------------------------------------------------------------

    def device_batch(self, batch: PackedBatch, accumulate: int | None = None) -> Arrays:
        """The batch on the mesh: ``[B,S]``, or ``[A,B,S]`` with ``accumulate`` micro-batches."""
        rows, length = batch.shape
        if length != self.stage.seq_len:
            raise ShapeError(
                f"trainer 'jax': rows of {length} tokens; stage {self.stage.name!r} has seq_len {self.stage.seq_len}"
            )
        spec = P(ROWS, "sp") if accumulate is None else P(None, ROWS, "sp")
        sharding = NamedSharding(self.mesh, spec)
        shape = (rows, length) if accumulate is None else (accumulate, rows // accumulate, length)
        return {f.name: jax.device_put(getattr(batch, f.name).reshape(shape), sharding) for f in fields(batch)}

    def modalities(self, batch: PackedBatch) -> tuple[str, ...]:
        """The modalities that the batch has targets of, so that no other head is computed."""
        found = batch.targets[batch.loss_weights > 0]
        slices = self.context.model.vocabulary.slices
        return tuple(name for name, ids in slices.items() if ((found >= ids.start) & (found < ids.stop)).any())

    def step(self, batch: PackedBatch, step: int) -> Metrics:
        """One optimizer step; see ``lwm_core.protocols.Trainer.step``."""
        lr = self.stage.lr_at(step)
        arrays = self.device_batch(batch, self.stage.accumulate)
        modalities = self.modalities(batch) or ("text",)
        self.parameters, self._state, metrics = self.compiled_step(
            self.parameters, self._state, arrays, jnp.float32(lr), modalities
        )
        return {**self._metrics(metrics), "lr": lr}

    def evaluate(self, batch: PackedBatch) -> Metrics:
        """The losses of a batch, without a step."""
        arrays = self.device_batch(batch)
        return self._metrics(self._evaluate(self.parameters, arrays, self.modalities(batch) or ("text",)))

    def _metrics(self, values: Arrays) -> Metrics:
        absent = {f"loss_{name}": 0.0 for name in self.context.model.vocabulary.slices}
        return {**absent, **{name: float(value) for name, value in jax.device_get(values).items()}}

    # -- on disk -------------------------------------------------------------------------------------------------

    @cached_property
    def _checkpointer(self) -> ocp.StandardCheckpointer:
        return ocp.StandardCheckpointer()

    def save(self, folder: Path) -> checkpoint.OrbaxSave:
        """Start writing parameters and optimizer into ``folder``."""
        return checkpoint.save(self._checkpointer, folder, {"parameters": self.parameters, "optimizer": self._state})

    def restore(self, folder: Path) -> None:
        """Read what :meth:`save` wrote, laid out on the current stage's mesh."""
        like = {"parameters": self.parameters, "optimizer": self._state}
        tree = checkpoint.restore(self._checkpointer, folder, like)
        self.parameters, self._state = tree["parameters"], tree["optimizer"]

    def iter_parameters(self) -> Iterator[tuple[str, np.ndarray]]:
        """(canonical name, one unstacked float32 array), one at a time."""
        if self.parameters is None:
            raise LwmError("trainer 'jax': begin_stage must come first; there are no parameters yet")
        yield from iter_canonical(traverse_util.flatten_dict(self.parameters), self.context.model)

    def load_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Take parameters by canonical name; before or after a stage has begun.

        Raises:
            CheckpointError: a parameter is missing or has another shape.
        """
        flat = traverse_util.flatten_dict(nnx.to_pure_dict(self._abstract))
        loaded = {path: stack_canonical(parameters, self.context.model, path) for path in flat}
        tree = traverse_util.unflatten_dict(loaded)
        if self._stage is not None:
            tree = jax.tree.map(jax.device_put, tree, self._shardings())
        self.parameters = tree

    # -- generation ----------------------------------------------------------------------------------------------

    @cached_property
    def _generator(self) -> Any:
        from lwm_jax_ring.generate.generator import JaxGenerator

        return JaxGenerator(self)

    def generator(self) -> Any:
        """Generation with the current parameters and the stage's RoPE and mesh."""
        return self._generator

    def scorer(self) -> Any:
        """Log-likelihoods with the current parameters and the stage's RoPE and mesh."""
        return self._generator

    def describe(self) -> Mapping[str, Any]:
        """Devices and versions, for run.json."""
        device = jax.devices()[0]
        return {
            "framework": "jax",
            "versions": {"jax": jax.__version__},
            "device_count": len(jax.devices()),
            "device_kind": device.device_kind,
            "platform": device.platform,
            "compute_dtype": self.options.compute_dtype,
            "peak_flops": peak_flops(self.options.peak_flops),
        }


def build_trainer(options: TrainerOptions, context: TrainerContext) -> JaxTrainer:
    """The factory of the plugin."""
    return JaxTrainer(options, context)
