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
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from jax.sharding import Mesh

from lwm_core.batch import PackedBatch
from lwm_core.errors import LwmError, ShapeError
from lwm_core.layout import SequenceLayout
from lwm_core.protocols import CompiledStep, Metrics, Processes, Stage, TrainerContext
from lwm_jax_ring.devices import agree_on_cpu, ensure_devices, peak_flops
from lwm_jax_ring.model.names import iter_canonical, stack_canonical
from lwm_jax_ring.model.network import Network
from lwm_jax_ring.model.sharding import place, place_rows
from lwm_jax_ring.train import checkpoint
from lwm_jax_ring.train.distributed import JaxProcesses, check_alone, join
from lwm_jax_ring.train.heartbeat import naming_the_lost
from lwm_jax_ring.train.optimizer import fresh_state
from lwm_jax_ring.train.options import TrainerOptions
from lwm_jax_ring.train.stage import StageProgram, fed_rows, stage_program
from lwm_jax_ring.train.step import Arrays


class JaxTrainer:
    """See ``lwm_core.protocols.Trainer``."""

    def __init__(self, options: TrainerOptions, context: TrainerContext) -> None:
        self.processes: Processes = join(options.join_timeout, options.host_devices)
        if options.host_devices is not None:
            ensure_devices(options.host_devices)
        self.heart = None
        if isinstance(self.processes, JaxProcesses):
            self.heart = self.processes.heart
            if jax.devices()[0].platform == "cpu":
                agree_on_cpu(self.processes.share, self.processes.rank == 0, self.processes.hosts())
        self.options, self.context = options, context
        self.network = Network(context.model, context.seed)
        self.parameters: Any = None
        self._state: Any = None
        self._stage: StageProgram | None = None

    # -- stages --------------------------------------------------------------------------------------------------

    @property
    def current(self) -> StageProgram:
        """The stage in hand, on its mesh."""
        if self._stage is None:
            raise LwmError("trainer 'jax': begin_stage must come first; no stage has been begun")
        return self._stage

    @property
    def stage(self) -> Stage:
        """The stage in hand."""
        return self.current.stage

    @property
    def mesh(self) -> Mesh:
        """Its mesh."""
        return self.current.mesh

    def begin_stage(self, stage: Stage) -> None:
        """Take up ``stage``: its mesh, length and RoPE; fresh moments; the parameters stay.

        Raises:
            ShapeError: the mesh does not fit the devices, or the rows do not divide over dp × fsdp.
            UnsupportedError: the attention's options do not fit the devices.
            UsageError: JAX runs in several processes that no launcher has told of each other.
            PeerLost: another process has died.
        """
        if self.processes.world == 1:
            check_alone()
        with naming_the_lost(self.heart):
            self._begin(stage)

    def _begin(self, stage: Stage) -> None:
        begun = stage_program(self.network, self.options, self.context, stage, jax.devices())
        if self._stage is not None and begun.mesh != self._stage.mesh:
            self.__dict__.pop("_generator", None)  # its programs are compiled for the old mesh
        self._stage = begun
        if self.parameters is None:
            self.parameters = jax.jit(self.network.initial, out_shardings=begun.shardings)()
        else:
            self.parameters = jax.tree.map(place, self.parameters, begun.shardings)
        self._state = fresh_state(self.context.optimizer, self.parameters, begun.mesh)

    def choices(self) -> Sequence[str]:
        """How the attention's strategy was chosen, where it was left open."""
        return [f"attention {reason}" for reason in self.current.attention.reasons]

    def compile_ahead(self, stage: Stage, topology: str) -> CompiledStep:
        """See ``lwm_core.protocols.CompilesAhead``."""
        from lwm_jax_ring.aot.compile import compile_stage

        return compile_stage(self.network, self.options, self.context, stage, topology)

    @property
    def layout(self) -> SequenceLayout:
        """The layout that batches of the stage must be permuted to."""
        layout: SequenceLayout = self.current.backend.layout
        return layout

    def data_rank(self, stage: Stage) -> tuple[int, int]:
        """(rank, world) of the rows that this process feeds in ``stage``: what its devices train on.

        Raises:
            ShapeError: the mesh does not fit the devices, or deals unequal rows to processes.
        """
        return (0, 1) if self.processes.world == 1 else fed_rows(stage, jax.devices(), self.processes.rank)

    # -- steps ---------------------------------------------------------------------------------------------------

    def device_batch(self, batch: PackedBatch, accumulate: int | None = None) -> Arrays:
        """This process's rows as its part of the batch on the mesh: ``[B,S]``, or ``[A,B,S]`` with ``accumulate``."""
        rows, length = batch.shape
        if length != self.stage.seq_len:
            raise ShapeError(
                f"trainer 'jax': rows of {length} tokens; stage {self.stage.name!r} has seq_len {self.stage.seq_len}"
            )
        sharding = self.current.batch_sharding(accumulate is not None)
        shape = (rows, length) if accumulate is None else (accumulate, rows // accumulate, length)
        rank, world = self.data_rank(self.stage)
        return {f.name: place_rows(getattr(batch, f.name).reshape(shape), sharding, rank, world) for f in fields(batch)}

    def modalities(self, batch: PackedBatch) -> tuple[str, ...]:
        """The modalities that any process's batch has targets of, so that no other head is computed."""
        found = batch.targets[batch.loss_weights > 0]
        slices = self.context.model.vocabulary.slices
        here = {name: bool(((found >= ids.start) & (found < ids.stop)).any()) for name, ids in slices.items()}
        if self.data_rank(self.stage)[1] > 1 and len(here) > 1:  # all processes must compile the same program
            here = {name: bool(self.processes.largest(int(found))) for name, found in here.items()}
        return tuple(name for name, found in here.items() if found)

    def step(self, batch: PackedBatch, step: int) -> Metrics:
        """One optimizer step; see ``lwm_core.protocols.Trainer.step``."""
        lr = self.stage.lr_at(step)
        arrays = self.device_batch(batch, self.stage.accumulate)
        modalities = self.modalities(batch) or ("text",)
        with naming_the_lost(self.heart):
            self.parameters, self._state, metrics = self.current.step(
                self.parameters, self._state, arrays, np.float32(lr), modalities
            )
            return {**self._metrics(metrics), "lr": lr}

    def evaluate(self, batch: PackedBatch) -> Metrics:
        """The losses of a batch, without a step."""
        arrays = self.device_batch(batch)
        modalities = self.modalities(batch) or ("text",)
        with naming_the_lost(self.heart):
            return self._metrics(self.current.evaluate(self.parameters, arrays, modalities))

    def _metrics(self, values: Arrays) -> Metrics:
        absent = {f"loss_{name}": 0.0 for name in self.context.model.vocabulary.slices}
        return {**absent, **{name: float(value) for name, value in jax.device_get(values).items()}}

    # -- on disk -------------------------------------------------------------------------------------------------

    @cached_property
    def _checkpointer(self) -> ocp.StandardCheckpointer:
        return ocp.StandardCheckpointer()

    def save(self, folder: Path) -> checkpoint.OrbaxSave:
        """Start writing parameters and optimizer into ``folder``, which every process sees."""
        with naming_the_lost(self.heart):
            tree = {"parameters": self.parameters, "optimizer": self._state}
            return checkpoint.save(self._checkpointer, folder, tree)

    def restore(self, folder: Path) -> None:
        """Read what :meth:`save` wrote, laid out on the current stage's mesh."""
        like = {"parameters": self.parameters, "optimizer": self._state}
        with naming_the_lost(self.heart):
            tree = checkpoint.restore(self._checkpointer, folder, like)
        self.parameters, self._state = tree["parameters"], tree["optimizer"]

    def iter_parameters(self) -> Iterator[tuple[str, np.ndarray]]:
        """(canonical name, one unstacked float32 array), one at a time; all processes go through all of them."""
        if self.parameters is None:
            raise LwmError("trainer 'jax': begin_stage must come first; there are no parameters yet")
        found = iter_canonical(traverse_util.flatten_dict(self.parameters), self.context.model)
        while True:
            with naming_the_lost(self.heart):
                one = next(found, None)
            if one is None:
                return
            yield one
            del one  # before the next is made

    def load_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Take parameters by canonical name; before or after a stage has begun.

        Raises:
            CheckpointError: a parameter is missing or has another shape.
        """
        flat = traverse_util.flatten_dict(self.network.shapes)
        loaded = {path: stack_canonical(parameters, self.context.model, path) for path in flat}
        tree = traverse_util.unflatten_dict(loaded)
        if self._stage is not None:
            tree = jax.tree.map(place, tree, self._stage.shardings)
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
        device, world = jax.devices()[0], self.processes.world
        hint = {"device_hint": f"{world} processes have {jax.local_device_count()} each"} if world > 1 else {}
        return {
            **hint,
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
