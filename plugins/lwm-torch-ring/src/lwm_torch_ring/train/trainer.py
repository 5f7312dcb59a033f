"""The trainer ``torch``: parameters and optimizer on a mesh of processes.

Shapes: A micro-batches, B rows of one, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lwm_core.batch import PackedBatch
from lwm_core.errors import CheckpointError, LwmError
from lwm_core.layout import SequenceLayout
from lwm_core.mesh import resolve_mesh
from lwm_core.model import canonical_shapes
from lwm_core.protocols import ALONE, Metrics, Processes, Stage, TrainerContext
from lwm_torch_ring.devices import peak_flops
from lwm_torch_ring.model.compiled import forget
from lwm_torch_ring.model.llama import Llama
from lwm_torch_ring.model.sharding import Gathering, Meshes, as_array, build, fill, materialise, named, whole
from lwm_torch_ring.train.checkpoint import Checkpointer, DcpSave
from lwm_torch_ring.train.distributed import TorchProcesses, heartbeat, join, torchrun_line
from lwm_torch_ring.train.heartbeat import naming_the_lost
from lwm_torch_ring.train.optimizer import AdamW
from lwm_torch_ring.train.options import TrainerOptions
from lwm_torch_ring.train.stage import Place, StageProgram, stage_program
from lwm_torch_ring.train.step import Losses


class TorchTrainer:
    """See ``lwm_core.protocols.Trainer``. Every rank calls every method at the same time."""

    def __init__(self, options: TrainerOptions, context: TrainerContext) -> None:
        self.options, self.context = options, context
        self.device = join(options.device, options.timeout)
        self.processes: Processes = TorchProcesses() if dist.is_initialized() else ALONE
        self.heart = heartbeat() if self.processes.world > 1 else None
        self._checkpointer = Checkpointer(options.timeout)
        self.model: Llama | None = None
        self._gathering: Gathering | None = None
        self._meshes: dict[tuple[int, ...], Meshes] = {}
        self._optimizer: AdamW | None = None
        self._program: StageProgram | None = None
        self._loaded: Mapping[str, Any] | None = None

    # -- stages --------------------------------------------------------------------------------------------------

    @property
    def current(self) -> StageProgram:
        """The stage in hand, on its mesh."""
        if self._program is None:
            raise LwmError("trainer 'torch': begin_stage must come first; no stage has been begun")
        return self._program

    @property
    def network(self) -> Llama:
        """The model of the stage in hand."""
        if self.model is None:
            raise LwmError("trainer 'torch': begin_stage must come first; there are no parameters yet")
        return self.model

    @property
    def gathering(self) -> Gathering:
        """Of the model's parameters, while it reads."""
        if self._gathering is None:
            raise LwmError("trainer 'torch': begin_stage must come first; there are no parameters yet")
        return self._gathering

    @property
    def stage(self) -> Stage:
        """The stage in hand."""
        return self.current.stage

    def begin_stage(self, stage: Stage) -> None:
        """Take up ``stage``: its mesh, length and RoPE; fresh moments; the parameters stay.

        Raises:
            ShapeError: the mesh does not fit the ranks, or rows, heads or tokens do not divide over it.
        """
        with naming_the_lost(self.heart):
            begun = stage_program(
                self.options, self.context, stage, self.device, self.processes.rank, self.processes.world,
                self._meshes,
            )  # fmt: skip
            if self.model is None or (self._program is not None and self._program.meshes is not begun.meshes):
                self._lay_out(begun)
            self._program = begun
            if self.options.compile:
                forget()
            if self._optimizer is None:
                self._optimizer = AdamW(self.context.optimizer, dict(named(self.network)))
            else:
                self._optimizer.reset()

    def _lay_out(self, begun: StageProgram) -> None:
        """Make the model on the mesh of ``begun``, with the parameters there are."""
        old, self._optimizer = self.model, None
        self.model = build(self.context.model, begun.meshes)
        self._gathering = Gathering(self.model)
        if old is None and self._loaded is None:
            materialise(self.model, self.device, self.context.seed)
            return
        self.model.to_empty(device=self.device)
        values = dict(named(old)) if old is not None else {}
        with torch.no_grad():
            for name, parameter in named(self.model):
                value = whole(values[name]) if old is not None else _as_tensor(self._loaded, name, parameter.shape)
                fill(self.model, name, parameter, value.to(self.device))
        self._loaded = None

    def choices(self) -> Sequence[str]:
        """How the attention's strategy and kernel were chosen, where they were left open."""
        return [f"attention {reason}" for reason in self.current.attention.reasons]

    @property
    def layout(self) -> SequenceLayout:
        """The layout that batches of the stage must be permuted to."""
        layout: SequenceLayout = self.current.backend.layout
        return layout

    def data_rank(self, stage: Stage) -> tuple[int, int]:
        """(rank, world) of the rows that this process feeds in ``stage``."""
        return Place(resolve_mesh(stage.mesh, self.processes.world), self.processes.rank).data_rank

    # -- steps ---------------------------------------------------------------------------------------------------

    @property
    def _losses(self) -> Losses:
        model = self.context.model
        return Losses(
            self.network, self.current, model.vocabulary, self.context.loss_weights, self.options.loss_chunk,
            self.options.compile,
        )  # fmt: skip

    def step(self, batch: PackedBatch, step: int) -> Metrics:
        """One optimizer step on this data rank's rows; see ``lwm_core.protocols.Trainer.step``."""
        lr = self.stage.lr_at(step)
        assert self._optimizer is not None
        with naming_the_lost(self.heart):
            metrics = self._losses.run(self.current.batch(batch, self.stage.accumulate), backward=True)
            return {**metrics, "grad_norm": self._optimizer.step(lr), "lr": lr}

    def evaluate(self, batch: PackedBatch) -> Metrics:
        """The losses of a batch, without a step."""
        with naming_the_lost(self.heart), torch.no_grad():
            found = self._losses.run(self.current.batch(batch), backward=False)
            self.gathering.apart()  # the tables stay together after a forward pass, and may change before the next
            return found

    # -- on disk -------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        assert self._optimizer is not None
        parameters = {f"parameters.{name}": p.detach() for name, p in named(self.network)}
        return {**parameters, **self._optimizer.state()}

    def save(self, folder: Path) -> DcpSave:
        """Start writing parameters and optimizer into ``folder``, which every rank sees."""
        with naming_the_lost(self.heart):
            return self._checkpointer.save(folder, self._state())

    def restore(self, folder: Path) -> None:
        """Read what :meth:`save` wrote, on whatever mesh the current stage has."""
        state = self._state()
        assert self._optimizer is not None
        with naming_the_lost(self.heart):
            self._checkpointer.restore(folder, state)
        self._optimizer.took(state["optimizer.step"])

    def iter_parameters(self) -> Iterator[tuple[str, np.ndarray]]:
        """(canonical name, one whole float32 array), one at a time; all ranks go through all of them.

        Each is a copy, since training may go on, and the only one: no more of it is in memory than that.
        """
        parameters = dict(named(self.network))
        for name in canonical_shapes(self.context.model):
            with naming_the_lost(self.heart):
                array = as_array(parameters[name])
            yield name, array
            del array  # before the next is made

    def load_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Take parameters by canonical name; before or after a stage has begun.

        Raises:
            CheckpointError: a parameter is missing or has another shape.
        """
        for name, shape in canonical_shapes(self.context.model).items():
            if name not in parameters:
                raise CheckpointError(f"parameter {name!r} is missing; the model needs it with shape {shape}")
        if self.model is None:
            self._loaded = parameters
            return
        with torch.no_grad():
            for name, parameter in named(self.model):
                fill(self.model, name, parameter, _as_tensor(parameters, name, parameter.shape).to(self.device))

    # -- generation ----------------------------------------------------------------------------------------------

    @cached_property
    def _generator(self) -> Any:
        from lwm_torch_ring.generate.generator import TorchGenerator

        return TorchGenerator(self)

    def generator(self) -> Any:
        """Generation with the current parameters and the stage's RoPE and mesh."""
        return self._generator

    def scorer(self) -> Any:
        """Log-likelihoods with the current parameters and the stage's RoPE and mesh."""
        return self._generator

    def describe(self) -> Mapping[str, Any]:
        """Devices and versions, for run.json."""
        on_gpu = self.device.type == "cuda"
        return {
            "framework": "torch",
            "versions": {"torch": torch.__version__},
            "device_count": self.processes.world,
            "device_hint": f"a process is started for each device: {torchrun_line('DEVICES')}",
            "device_kind": torch.cuda.get_device_name(self.device) if on_gpu else "cpu",
            "platform": self.device.type,
            "compute_dtype": self.options.compute_dtype,
            "peak_flops": peak_flops(self.device, self.processes.world, self.options.peak_flops),
        }


def _as_tensor(given: Mapping[str, Any] | None, name: str, shape: Sequence[int]) -> torch.Tensor:
    assert given is not None
    array = np.asarray(given[name])
    if array.shape != tuple(shape):
        raise CheckpointError(f"parameter {name!r} has shape {array.shape}; the model needs {tuple(shape)}")
    return torch.from_numpy(array.astype(np.float32))  # a copy: what was given may be read-only, or bfloat16


def build_trainer(options: TrainerOptions, context: TrainerContext) -> TorchTrainer:
    """The factory of the plugin."""
    return TorchTrainer(options, context)
