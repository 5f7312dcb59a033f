"""Ranks as threads of this process, which write down what they send: for tests that count."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from queue import Queue
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lwm_torch_ring.attention.peers import Neighbourhood, Parcel, Peers, Pending

Sent = Counter[tuple[str, str]]
"""(transfer, dtype) → how many tensors of more than two dimensions; ids are left out."""


class _Arrival:
    """What has been posted is only there once it has been waited for, as between processes."""

    def __init__(self, queue: Queue[Tensor], into: Tensor) -> None:
        self._queue, self._into = queue, into
        into.fill_(torch.nan)

    def wait(self) -> None:
        self._into.copy_(self._queue.get(timeout=60))


class _Told(Pending):
    """Says when it is waited for."""

    def __init__(self, works: Sequence[tuple[Any, str]], happened: Callable[[str], None]) -> None:
        super().__init__(works)
        self._happened = happened

    def wait(self) -> None:
        super().wait()
        self._happened("wait")


class Street:
    """What ``world`` threads share."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.queues: dict[Any, Queue[Tensor]] = {}
        self.lock = threading.Lock()
        self.sent: Sent = Counter()  # of rank 0
        self.events: dict[int, list[str]] = {rank: [] for rank in range(world)}  # what each has done, in order

    def queue(self, *key: Any) -> Queue[Tensor]:
        """The queue of this name."""
        with self.lock:
            return self.queues.setdefault(key, Queue())


class ThreadPeers(Peers):
    """The same transfers between threads."""

    def __init__(self, street: Street, ranks: Sequence[int], rank: int) -> None:
        super().__init__(None, ranks, rank)
        self.street = street

    def _note(self, what: str, x: Tensor) -> None:
        if self.ranks[self.rank] == 0 and x.is_floating_point():
            self.street.sent[what, str(x.dtype).removeprefix("torch.")] += 1

    def _put(self, place: int, x: Tensor) -> None:
        self.street.queue(self.ranks, self.rank, place).put(x.clone())

    def _from(self, place: int) -> Queue[Tensor]:
        return self.street.queue(self.ranks, place, self.rank)

    def post(self, *parcels: Parcel) -> Pending:
        works = []
        for content, ahead, into in parcels:
            self._note("post", content)
            self._put((self.rank + ahead) % self.size, content)
            works.append((_Arrival(self._from((self.rank - ahead) % self.size), into), "a thread"))
        self._happened("post")
        return _Told(works, self._happened)

    def _happened(self, event: str) -> None:
        self.street.events[self.ranks[self.rank]].append(event)

    def _all(self, parts: Sequence[Tensor]) -> Tensor:
        for place, part in enumerate(parts):
            self._put(place, part)
        return torch.stack([self._from(place).get(timeout=60) for place in range(self.size)])

    def gather(self, x: Tensor) -> tuple[Tensor, Pending]:
        self._note("gather", x)
        if x.is_floating_point():
            self._happened("post")
        return self._all([x] * self.size), _Told((), self._happened if x.is_floating_point() else lambda _: None)

    def scatter_sum(self, x: Tensor) -> Tensor:
        self._note("scatter_sum", x)
        return self._all(list(x)).sum(0)

    def exchange(self, x: Tensor) -> Tensor:
        self._note("exchange", x)
        return self._all(list(x))


def neighbours(street: Street, rank: int, inner: int) -> Neighbourhood:
    """As ``lwm_torch_ring.attention.peers.neighbourhood``, of threads."""
    ranks = tuple(range(street.world))
    first = rank - rank % inner
    return Neighbourhood(
        ThreadPeers(street, ranks, rank),
        ThreadPeers(street, ranks[rank % inner :: inner], rank // inner),
        ThreadPeers(street, ranks[first : first + inner], rank % inner),
    )


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operator of torch gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def together(world: int, run: Callable[[int], Any]) -> list[Any]:
    """``run(rank)`` of all ranks at once; the first error is raised."""
    results: list[Any] = [None] * world
    errors: list[BaseException] = []

    def one(rank: int) -> None:
        try:
            results[rank] = run(rank)
        except BaseException as error:  # raised below, in the thread that asked
            errors.append(error)

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive() and not errors:
            thread.join(timeout=0.05)
    if errors:
        raise errors[0]
    return results
