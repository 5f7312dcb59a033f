"""Tensor parallelism with the stream cut by tokens (arXiv 2205.05198): each rank has a share of heads and feed-forward.

Between the matrices of a layer the ranks of ``tp`` hold different tokens; before a pair of matrices their tokens are
brought together, after it the partial sums are added up and dealt out again. Parameters are DTensors over ``tp``.

Shapes: B batch, C tokens of a sequence shard, E hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

TOKENS = 1
"""The dimension of a stream ``[B,C,E]`` that is cut over ``tp``."""


@dataclass(frozen=True)
class TensorParallel:
    """The ranks of ``tp``.

    Args:
        mesh: a ``DeviceMesh`` of the one axis; none: one rank.
        cut: whether the stream is cut by tokens; decoding, which has one, keeps it whole on every rank.
    """

    mesh: Any | None = None
    cut: bool = True

    @property
    def size(self) -> int:
        """How many ranks."""
        return 1 if self.mesh is None else int(self.mesh.size())

    @property
    def rank(self) -> int:
        """This process's."""
        return 0 if self.mesh is None else int(self.mesh.get_local_rank())

    @property
    def whole(self) -> TensorParallel:
        """The same ranks with the stream whole on each."""
        return replace(self, cut=False)

    def mine(self, x: Tensor) -> Tensor:
        """This rank's tokens of ``x [B,C,...]``."""
        return x if self.mesh is None or not self.cut else x.chunk(self.size, dim=TOKENS)[self.rank]

    def together(self, x: Tensor) -> Tensor:
        """The stream's tokens of all ranks; gradients are added up on the way back."""
        if self.mesh is None or not self.cut:
            return x
        spread = DTensor.from_local(x, self.mesh, [Shard(TOKENS)], run_check=False)
        return spread.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])

    def summed(self, x: Tensor) -> Tensor:
        """The sum of all ranks' ``x``, dealt out by tokens where the stream is."""
        if self.mesh is None:
            return x
        place = Shard(TOKENS) if self.cut else Replicate()
        partial = DTensor.from_local(x, self.mesh, [Partial()], run_check=False)
        return partial.redistribute(placements=[place]).to_local()


def share(parameter: Tensor) -> Tensor:
    """This rank's share of a matrix that ``tp`` cuts; anything else as it is."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def entire(parameter: Tensor) -> Tensor:
    """The whole of a parameter that every rank of ``tp`` uses on its own tokens; its gradients are added up."""
    if not isinstance(parameter, DTensor):
        return parameter
    together = parameter.redistribute(placements=[Replicate()] * parameter.device_mesh.ndim)
    return together.to_local(grad_placements=[Partial()] * parameter.device_mesh.ndim)


def bias_share(bias: Tensor, columns: int, rank: int) -> Tensor:
    """The ``columns`` of a bias that belong to the matrix's share of ``rank``."""
    return entire(bias)[rank * columns : (rank + 1) * columns]
