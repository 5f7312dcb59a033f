"""Ranks as threads of this process, which write down what they send: for tests that count."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from queue import Queue
from typing import Any

import torch
from torch import Tensor

from lwm_torch_ring.attention.peers import Neighbourhood, Parcel, Peers, Pending

Sent = Counter[tuple[str, str]]
"""(transfer, dtype) → how many tensors of more than two dimensions; ids are left out."""


class _Arrival:
    def __init__(self, queue: Queue[Tensor], into: Tensor) -> None:
        self._queue, self._into = queue, into

    def wait(self) -> None:
        self._into.copy_(self._queue.get(timeout=60))


class Street:
    """What ``world`` threads share."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.queues: dict[Any, Queue[Tensor]] = {}
        self.lock = threading.Lock()
        self.sent: Sent = Counter()  # of rank 0

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
        return Pending(works)

    def _all(self, parts: Sequence[Tensor]) -> Tensor:
        for place, part in enumerate(parts):
            self._put(place, part)
        return torch.stack([self._from(place).get(timeout=60) for place in range(self.size)])

    def gather(self, x: Tensor) -> tuple[Tensor, Pending]:
        self._note("gather", x)
        return self._all([x] * self.size), Pending(())

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
