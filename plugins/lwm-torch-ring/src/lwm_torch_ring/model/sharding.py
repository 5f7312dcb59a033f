"""Where every parameter lies: cut over ``tp`` by heads and columns, and shared out over the data axes by FSDP2.

Two meshes hold the same ranks. Batches and attention see ``dp, fsdp, tp, sp``. Parameters see ``replicate, shard, tp``:
``sp`` ranks hold different tokens but the same parameters, so they share them out like ``fsdp``.

Shapes: the canonical ones of ``lwm_core.model``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from lwm_core.errors import ShapeError
from lwm_core.mesh import MESH_AXES
from lwm_core.model import ModelConfig
from lwm_torch_ring.model.llama import Linear, Llama, RMSNorm, Table, initial, part_of
from lwm_torch_ring.model.tensor_parallel import TensorParallel


@dataclass(frozen=True)
class Meshes:
    """The ranks of a run, as batches and attention see them and as parameters do; none of both: one process."""

    axes: DeviceMesh | None
    parameters: DeviceMesh | None

    @property
    def tensor_parallel(self) -> TensorParallel:
        """The ranks of ``tp``."""
        if self.parameters is None or self.parameters.size(2) == 1:
            return TensorParallel()
        return TensorParallel(self.parameters["tp"])


def make_meshes(sizes: Mapping[str, int], shared_over: Sequence[str], device: torch.device) -> Meshes:
    """The meshes of ``sizes`` ranks; every rank calls it at the same time.

    Args:
        sizes: ranks of ``dp, fsdp, tp, sp``; they multiply to the world.
        shared_over: of ``dp, fsdp, sp`` those that share parameters out; the others hold copies.
    """
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    ranks = torch.arange(int(torch.tensor(shape).prod())).view(shape)
    if ranks.numel() == 1:
        return Meshes(None, None)
    copies = [axis for axis in MESH_AXES if axis != "tp" and axis not in shared_over]
    shares = [axis for axis in MESH_AXES if axis in shared_over]
    order = [MESH_AXES.index(axis) for axis in (*copies, *shares, "tp")]
    count = torch.tensor([sizes[axis] for axis in shares]).prod().int().item() if shares else 1
    by_parameter = ranks.permute(order).reshape(-1, int(count), sizes["tp"])
    return Meshes(
        DeviceMesh(device.type, ranks, mesh_dim_names=MESH_AXES),
        DeviceMesh(device.type, by_parameter, mesh_dim_names=("replicate", "shard", "tp")),
    )


def check_tensor_parallel(config: ModelConfig, sizes: Mapping[str, int], seq_len: int) -> None:
    """Raise ShapeError unless ``tp`` divides what it cuts."""
    tp = sizes["tp"]
    if tp == 1:
        return
    for what, size in (
        ("heads", config.num_heads),
        ("key-value heads", config.num_kv_heads),
        ("feed-forward columns", config.intermediate_size),
        ("rows of the vocabulary", config.vocabulary.size),
        ("tokens of a sequence shard", seq_len // sizes["sp"]),
    ):
        if size % tp:
            raise ShapeError(f"trainer 'torch': {size} {what} do not divide over tp = {tp}; choose a tp that does")


PLACES: dict[str, Placement] = {"columns": Shard(0), "rows": Shard(1), "table": Shard(0), "whole": Replicate()}
"""Of a parameter ``[out, in]`` over ``tp``, by its part."""


def _shared_dimension(parameter: nn.Parameter) -> Shard:
    """FSDP's dimension of a parameter under ``tp``: the other one of a matrix, so that both cut evenly."""
    return Shard(1) if isinstance(parameter, DTensor) and parameter.placements == (Shard(0),) else Shard(0)


def build(config: ModelConfig, meshes: Meshes, dtype: torch.dtype) -> Llama:
    """The network without values, laid out on the meshes; :func:`fill` gives it some."""
    with torch.device("meta"):
        model = Llama(config)
    mesh = meshes.parameters
    if mesh is None:
        return model
    if mesh.size(2) > 1:
        for path, module in model.named_modules():
            if isinstance(module, Linear | RMSNorm | Table):
                _cut(path, module, mesh)
    gradients = MixedPrecisionPolicy(param_dtype=None, reduce_dtype=torch.float32)
    layers = gradients if dtype == torch.float32 else MixedPrecisionPolicy(dtype, torch.float32)
    over = mesh["replicate", "shard"] if mesh.size(0) > 1 else mesh["shard"]
    placed = {"shard_placement_fn": _shared_dimension} if mesh.size(2) > 1 else {}
    for block in model.blocks:
        fully_shard(block, mesh=over, mp_policy=_no_cast(layers), **placed)  # type: ignore[arg-type]
    fully_shard(model, mesh=over, mp_policy=_no_cast(gradients), **placed)  # type: ignore[arg-type]
    for module in (*model.blocks, model):
        module.set_gradient_divide_factor(1.0)  # type: ignore[operator]
        module.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
    return model


def _no_cast(policy: MixedPrecisionPolicy) -> MixedPrecisionPolicy:
    """Inputs as they are: RoPE's angles stay float32."""
    return MixedPrecisionPolicy(policy.param_dtype, policy.reduce_dtype, cast_forward_inputs=False)


def _cut(path: str, module: nn.Module, mesh: DeviceMesh) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        place = PLACES[part_of(f"{path}.{name}")]
        cut = distribute_tensor(parameter.data, mesh["tp"], [place], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(cut))


def fill(model: Llama, name: str, parameter: Tensor, value: Tensor) -> None:
    """Give ``parameter`` its part of the whole ``value``, which every rank has."""
    local = local_part(parameter)
    if isinstance(parameter, DTensor):
        value = local_part(
            distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        )
    local.copy_(value)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def named(model: Llama) -> Iterator[tuple[str, Tensor]]:
    """(canonical name, this rank's parameter), in the order of the layers."""
    yield from model.named_parameters()


@torch.no_grad()
def materialise(model: Llama, device: torch.device, seed: int) -> None:
    """Fresh parameters, the same on any mesh, one at a time."""
    model.to_empty(device=device)
    for name, parameter in named(model):
        fill(model, name, parameter, initial(name, parameter.shape, model.config, seed, device))


def copies(parameter: Tensor) -> int:
    """How many ranks of the parameters' mesh hold the same part of a parameter."""
    if not isinstance(parameter, DTensor):
        return 1
    held = 1
    for size, place in zip(parameter.device_mesh.shape, parameter.placements, strict=True):
        held *= size if place.is_replicate() else 1
    return held


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank; all ranks of its mesh call it at the same time."""
    entire: Any = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return entire


GATHERED_SHARE = 1 / 4
"""Of the memory that is free, what gathered parameters may take while a model only reads."""


@contextmanager
def gathered(model: Llama, dtype: torch.dtype) -> Iterator[None]:
    """Parameters stay together between layers' calls, if there is room: each is then fetched once, not once a token.

    Afterwards they are dealt out again, so that changed ones are fetched anew.
    """
    modules = [module for module in (*model.blocks, model) if isinstance(module, FSDPModule)]
    room = bool(modules) and _agreed_to_fit(model, dtype)
    for module in modules:
        module.set_reshard_after_forward(not room, recurse=False)
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(module is not model, recurse=False)
            module.reshard()


def _agreed_to_fit(model: Llama, dtype: torch.dtype) -> bool:
    first = next(model.parameters())
    bytes_ = sum(parameter.numel() * dtype.itemsize for parameter in model.parameters())
    if first.device.type == "cuda":
        free = torch.cuda.mem_get_info(first.device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // max(1, dist.get_world_size())
    fits = torch.tensor(int(bytes_ <= free * GATHERED_SHARE))
    dist.all_reduce(fits, dist.ReduceOp.MIN)
    return bool(fits)
