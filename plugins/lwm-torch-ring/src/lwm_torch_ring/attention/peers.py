"""The ranks that hold a sequence together, and all that they send each other.

Transfers are posted and waited for apart, so that something can be computed between. gloo carries them on CPUs, NCCL on
GPUs, where they run on a stream of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from lwm_core.errors import LwmError, UnsupportedError

all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name up to torch 2.12
reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # the same


class PeerLost(LwmError):
    """A transfer did not come about, most often since another rank has died."""


class Parcel(NamedTuple):
    """``content`` for the rank that is ``ahead`` further on; ``into`` takes what comes from as far behind."""

    content: Tensor
    ahead: int
    into: Tensor


class Pending:
    """Transfers under way, with the ranks at their other ends."""

    def __init__(self, works: Sequence[tuple[Any, str]]) -> None:
        self._works = works

    def wait(self) -> None:
        """Until all has arrived (on a GPU: let the stream wait); raises PeerLost."""
        for work, whom in self._works:
            with told(whom):
                work.wait()


@contextmanager
def told(whom: str) -> Iterator[None]:
    """Errors of torch.distributed in our words."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PeerLost(
            f"torch-ring: lost {whom} ({message}); look at what that rank said last", details=str(error)
        ) from error


_peers: WeakValueDictionary[str, Peers] = WeakValueDictionary()
_numbers = count()


class Peers:
    """A process group in which this process is ``rank`` of ``size``.

    Args:
        group: none where there is one rank.
        ranks: global ranks of the group.
        rank: this process, by its place in ``ranks``.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, ranks: Sequence[int] = (0,), rank: int = 0) -> None:
        self.group, self.ranks, self.rank = group, tuple(ranks), rank
        self.handle = f"peers-{next(_numbers)}"
        _peers[self.handle] = self

    @staticmethod
    def of(handle: str) -> Peers:
        """The peers of a handle, by which operators of torch know them."""
        return _peers[handle]

    @property
    def size(self) -> int:
        """How many ranks."""
        return len(self.ranks)

    def post(self, *parcels: Parcel) -> Pending:
        """Send and receive parcels, all at once."""
        ops, whom = [], []
        for content, ahead, into in parcels:
            to, source = (self.rank + ahead) % self.size, (self.rank - ahead) % self.size
            ops += [
                dist.P2POp(dist.isend, content, group=self.group, group_peer=to),
                dist.P2POp(dist.irecv, into, group=self.group, group_peer=source),
            ]
            whom += [f"rank {self.ranks[to]}", f"rank {self.ranks[source]}"]
        with told(" or ".join(dict.fromkeys(whom))):
            works = dist.batch_isend_irecv(ops)
        if len(works) == len(whom):
            return Pending(list(zip(works, whom, strict=True)))
        return Pending([(work, " or ".join(dict.fromkeys(whom))) for work in works])  # NCCL: one work for the batch

    @property
    def _anyone(self) -> str:
        return f"one of ranks {', '.join(map(str, self.ranks))}"

    def gather(self, x: Tensor) -> tuple[Tensor, Pending]:
        """``[size, ...]`` of everyone's ``x``, there once the transfer has been waited for."""
        out = x.new_empty((self.size, *x.shape))
        if self.size == 1:
            out[0].copy_(x)
            return out, Pending(())
        with told(self._anyone):
            work = all_gather_flat(out.view(-1), x.contiguous().view(-1), group=self.group, async_op=True)
        return out, Pending([(work, self._anyone)])

    def scatter_sum(self, x: Tensor) -> Tensor:
        """``[size, ...]`` → this rank's part of the sum over ranks."""
        if self.size == 1:
            return x[0]
        out = torch.empty_like(x[0])
        with told(self._anyone):
            reduce_scatter_flat(out.view(-1), x.view(-1), group=self.group)
        return out

    def exchange(self, x: Tensor) -> Tensor:
        """``[size, ...]``, part i for rank i → ``[size, ...]``, part i from rank i."""
        out = torch.empty_like(x)
        if self.size == 1:
            return out.copy_(x)
        with told(self._anyone):
            dist.all_to_all_single(out, x, group=self.group)
        return out


class Neighbourhood(NamedTuple):
    """The ranks of a mesh axis: ``everyone``, of whom every ``inner`` neighbours are one rank of a ``ring``."""

    everyone: Peers
    ring: Peers
    inner: Peers


def neighbourhood(everyone: Peers, inner: int) -> Neighbourhood:
    """Split ``everyone`` by index into groups of ``inner`` neighbours and rings across them.

    Every member calls it at the same time: making groups is a collective.
    """
    rank, size, ranks = everyone.rank, everyone.size, everyone.ranks
    alone = Peers(None, (ranks[rank],))
    if inner == 1:
        return Neighbourhood(everyone, everyone, alone)
    if inner == size:
        return Neighbourhood(everyone, alone, everyone)
    first = rank - rank % inner
    near, across = ranks[first : first + inner], ranks[rank % inner :: inner]
    return Neighbourhood(
        everyone,
        Peers(_subgroup(across), across, rank // inner),
        Peers(_subgroup(near), near, rank % inner),
    )


_groups: dict[tuple[int, ...], tuple[Any, dist.ProcessGroup]] = {}


def _subgroup(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    """A process group of these global ranks; made once, since groups hold connections."""
    world = dist.group.WORLD
    if ranks not in _groups or _groups[ranks][0] is not world:
        _groups[ranks] = world, dist.new_group(list(ranks), use_local_synchronization=True)
    return _groups[ranks][1]


def peers_on(mesh: Any | None, axis: str) -> Peers:
    """The ranks of axis ``axis`` of a ``DeviceMesh``; no mesh, or one without that axis, is one rank.

    Raises:
        UnsupportedError: the axis does not run through its ranks in ascending order.
    """
    names = () if mesh is None else mesh.mesh_dim_names or ()
    if axis not in names or mesh.size(names.index(axis)) == 1:
        return Peers()
    group = mesh.get_group(axis)
    ranks, rank = dist.get_process_group_ranks(group), dist.get_rank(group)
    if group is dist.group.WORLD:  # whose line all else uses: a hop would queue behind gathered parameters
        group = _subgroup(tuple(ranks))
    if list(ranks) != sorted(ranks) or mesh.get_local_rank(axis) != rank:
        raise UnsupportedError(f"torch-ring: mesh axis {axis!r} has ranks {ranks} out of order; list them ascending")
    return Peers(group, ranks, rank)
