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
from math import prod
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from lwm_core.errors import LwmError, ShapeError
from lwm_core.mesh import MESH_AXES
from lwm_core.model import ModelConfig
from lwm_torch_ring.attention.peers import all_gather_flat
from lwm_torch_ring.model.llama import Linear, Llama, RMSNorm, Table, initial, part_of
from lwm_torch_ring.model.tensor_parallel import TensorParallel

NEAREST_LAST = ("dp", "fsdp", "sp", "tp")
"""Ranks are numbered along the axes in this order: those of ``tp``, which talk most, are neighbours on a host."""


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
    ranks = torch.arange(prod(sizes.values())).view([sizes[axis] for axis in NEAREST_LAST])
    ranks = ranks.permute([NEAREST_LAST.index(axis) for axis in MESH_AXES])
    if ranks.numel() == 1:
        return Meshes(None, None)
    copies = [axis for axis in MESH_AXES if axis != "tp" and axis not in shared_over]
    shares = [axis for axis in MESH_AXES if axis in shared_over]
    order = [MESH_AXES.index(axis) for axis in (*copies, *shares, "tp")]
    by_parameter = ranks.permute(order).reshape(-1, prod(sizes[axis] for axis in shares), sizes["tp"])
    return Meshes(
        DeviceMesh(device.type, ranks, mesh_dim_names=MESH_AXES),
        DeviceMesh(device.type, by_parameter, mesh_dim_names=("replicate", "shard", "tp")),
    )


def check_tensor_parallel(
    config: ModelConfig, sizes: Mapping[str, int], seq_len: int, shared_over: Sequence[str]
) -> None:
    """Raise ShapeError unless ``tp`` divides what it cuts, and what is left divides over the axes that share it."""
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
    shares = prod(sizes[axis] for axis in shared_over)
    if config.hidden_size % shares:
        raise ShapeError(
            f"trainer 'torch': with tp the hidden size must divide over {' x '.join(shared_over)} = {shares}, which "
            f"share parameters out, but it is {config.hidden_size}; change the mesh or trainer.shard_parameters"
        )


PLACES: dict[str, Placement] = {"columns": Shard(0), "rows": Shard(1), "table": Shard(0), "whole": Replicate()}
"""Of a parameter ``[out, in]`` over ``tp``, by its part."""


def _shared_dimension(parameter: nn.Parameter) -> Shard:
    """FSDP's dimension of a parameter under ``tp``: the other one of a matrix, so that both cut evenly."""
    return Shard(1) if isinstance(parameter, DTensor) and parameter.placements == (Shard(0),) else Shard(0)


def build(config: ModelConfig, meshes: Meshes) -> Llama:
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
    # Float32 all through: a matrix is cast where it is used, so that the gradients of slices, micro-batches and ranks
    # are added up in float32 and a run gives the same on any mesh. Gathered in bfloat16 they would not be.
    plain = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    over = mesh["replicate", "shard"] if mesh.size(0) > 1 else mesh["shard"]
    placed = {"shard_placement_fn": _shared_dimension} if mesh.size(2) > 1 else {}
    for block in model.blocks:
        fully_shard(block, mesh=over, mp_policy=plain, **placed)  # type: ignore[arg-type]
    fully_shard(model, mesh=over, mp_policy=plain, **placed)  # type: ignore[arg-type]
    for module in (*model.blocks, model):
        module.set_gradient_divide_factor(1.0)  # type: ignore[operator]
        module.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
    return model


def _cut(path: str, module: nn.Module, mesh: DeviceMesh) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        place = PLACES[part_of(f"{path}.{name}")]
        cut = distribute_tensor(parameter.data, mesh["tp"], [place], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(cut))


def fill(model: Llama, name: str, parameter: Tensor, value: Tensor) -> None:
    """Give ``parameter`` its part of the whole ``value``, which every rank has."""
    local = local_part(parameter)
    if isinstance(parameter, DTensor):
        value = local_part(distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None))
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


_BLOCK = 2 * 2**20  # bytes of a parameter that are brought together at a time


@torch.no_grad()
def as_array(parameter: Tensor) -> NDArray[np.float32]:
    """All of a parameter, in memory of its own; all ranks of its mesh call it at the same time.

    It is brought together in blocks of rows, so that beside the array itself there is hardly more than what this rank
    holds of it anyhow.
    """
    found = np.empty(parameter.shape, np.float32)
    to, local = torch.from_numpy(found), local_part(parameter)
    if not isinstance(parameter, DTensor) or parameter.ndim == 1:
        to.copy_(whole(parameter))
        return found
    rows, columns = (_cutting(parameter, dimension) for dimension in (0, 1))
    n_rows, n_columns = (1 if group is None else dist.get_world_size(group) for group in (rows, columns))
    held, width = -(-len(to) // n_rows), local.shape[1]  # rows of a rank, of which the last ones may have fewer
    step = min(held, max(1, _BLOCK // (local.element_size() * width * n_rows * n_columns)))
    block = local.new_zeros(step, width)
    beside = block.new_empty(n_columns, step, width)
    blocks = block.new_empty(n_rows, n_columns, step, width)
    for start in range(0, held, step):
        mine = local[start : start + step]
        block[: len(mine)] = mine
        _gather(beside, block, columns)
        _gather(blocks, beside, rows)
        for row in range(n_rows):
            first, last = row * held + start, min(row * held + min(start + step, held), len(to))
            for column in range(n_columns if first < last else 0):
                to[first:last, column * width : (column + 1) * width] = blocks[row, column, : last - first]
    return found


def _cutting(matrix: DTensor, dimension: int) -> dist.ProcessGroup | None:
    """The ranks that have this dimension of a matrix cut between them, in its order."""
    axes = [axis for axis, place in enumerate(matrix.placements) if place.is_shard(dimension)]
    if len(axes) > 1 or not all(type(place) in (Shard, Replicate) for place in matrix.placements):
        raise LwmError(
            f"trainer 'torch': a matrix is placed {matrix.placements}; expected one axis a dimension at most"
        )
    return matrix.device_mesh.get_group(axes[0]) if axes else None


def _gather(into: Tensor, part: Tensor, group: dist.ProcessGroup | None) -> None:
    """Each rank's part, one after the other."""
    if group is None:
        into.copy_(part.view_as(into))
    else:
        all_gather_flat(into.view(-1), part.view(-1), group=group)


GATHERED_SHARE = 1 / 4
"""Of the memory that is free, what gathered parameters may take while a model only reads."""


class Gathering:
    """Keeps parameters together between a model's calls while somebody reads with it, if there is room.

    Each is then fetched once, not once a token. When nobody reads any more they are dealt out again, so that changed
    ones are fetched anew.
    """

    def __init__(self, model: Llama) -> None:
        self._modules = [module for module in (*model.blocks, model) if isinstance(module, FSDPModule)]
        self._model, self._readers, self._kept = model, 0, False

    @property
    def lends(self) -> bool:
        """Whether parameters are gathered at all, and so there for a while only."""
        return bool(self._modules)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """While somebody reads; every rank enters and leaves at the same time."""
        if self._readers == 0:
            self._kept = _agreed_to_fit(self._model)
            if self._kept:
                for module in self._modules:
                    module.set_reshard_after_forward(False, recurse=False)
        self._readers += 1
        try:
            yield
        finally:
            self._readers -= 1
            if self._readers == 0:
                self.apart()

    def together(self) -> bool:
        """Fetch all parameters now, if somebody reads and they have room; whether they are together."""
        if self._readers == 0 or not self._kept:
            return False
        for module in self._modules:
            module.unshard()
        return True

    def apart(self) -> None:
        """Deal parameters out again."""
        for module in self._modules:
            module.set_reshard_after_forward(module is not self._model, recurse=False)
            module.reshard()


def _agreed_to_fit(model: Llama) -> bool:
    first = next(model.parameters())
    cut = first.device_mesh.size(-1) if isinstance(first, DTensor) and first.device_mesh.ndim > 1 else 1
    wanted = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) // cut
    if first.device.type == "cuda":
        unused = torch.cuda.memory_reserved(first.device) - torch.cuda.memory_allocated(first.device)
        free = torch.cuda.mem_get_info(first.device)[0] + unused
    else:
        free = (
            os.sysconf("SC_AVPHYS_PAGES")
            * os.sysconf("SC_PAGE_SIZE")
            // (dist.get_world_size() if dist.is_initialized() else 1)
        )
    fits = torch.tensor(int(wanted <= free * GATHERED_SHARE))
    if dist.is_initialized():
        dist.all_reduce(fits, dist.ReduceOp.MIN)
    return bool(fits)
