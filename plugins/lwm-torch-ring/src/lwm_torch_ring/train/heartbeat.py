"""Who of the ranks is still alive, told over the store through which they have met.

A rank counts up a number in the store every second. A rank whose number stands still for long has died or its host is
gone: whoever notices writes that down, and all ranks end with its name. That is the last resort: a transfer that fails
(``naming_the_lost``) asks at once whose numbers stand still.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lwm_core.errors import LwmError
from lwm_torch_ring.attention.peers import PeerLost

INTERVAL = 1.0
"""Seconds between two beats."""

SILENCE = 40.0
"""Seconds without a beat of its neighbour after which a rank takes it for lost."""

VERDICT = "lwm/lost"
LEFT = "left"
LOST_WORDS = ("gloo", "nccl", "connection", "broken pipe", "peer", "timed out", "timeout", "socket")


class Heartbeat:
    """The beats of one process and a watch over its neighbour.

    Args:
        rank, world: this process among all.
        address, port: of the store; a connection of its own is made, for the process's other one may be waiting.
    """

    def __init__(self, rank: int, world: int, address: str, port: int) -> None:
        self.rank, self.world = rank, world
        self._where = address, port
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lwm-heartbeat", daemon=True)
        self._store: Any = None

    def start(self) -> None:
        """Begin to beat."""
        self._store = self._connect()
        self._store.set(self._key(self.rank), "0")
        self._thread.start()

    def stop(self) -> None:
        """Leave in good order: from now on silence means nothing."""
        if self._thread.is_alive():
            self._stopped.set()
            self._thread.join(5 * INTERVAL)

    def _connect(self) -> Any:
        address, port = self._where
        return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10), wait_for_workers=False)

    @staticmethod
    def _key(rank: int) -> str:
        return f"lwm/beat/{rank}"

    def _run(self) -> None:
        beats, seen, since = 0, "", time.monotonic()
        neighbour = (self.rank + 1) % self.world
        try:
            while not self._stopped.wait(INTERVAL):
                beats += 1
                self._store.set(self._key(self.rank), str(beats))
                if self._store.check([VERDICT]):
                    self._end(self._store.get(VERDICT).decode())
                now = self._read(self._store, neighbour)
                if now != seen or now == LEFT:
                    seen, since = now, time.monotonic()
                elif time.monotonic() - since > SILENCE:
                    verdict = f"rank {neighbour} has not been heard of for {SILENCE:.0f} seconds"
                    self._store.set(VERDICT, verdict)
                    self._end(verdict)
            self._store.set(self._key(self.rank), LEFT)
        except RuntimeError:  # the store is gone, and with it the process that kept it: a transfer will tell
            return

    def _read(self, store: Any, rank: int) -> str:
        if not store.check([self._key(rank)]):
            return ""
        beat: str = store.get(self._key(rank)).decode()
        return beat

    def _end(self, verdict: str) -> None:
        """End the process from its side thread: its main thread may wait for the lost rank for ever."""
        print(f"error: rank {self.rank}: {verdict}; ending", file=sys.stderr, flush=True)
        os._exit(1)

    def gone(self, patience: float = 4 * INTERVAL) -> str | None:
        """Which ranks do not beat for ``patience`` seconds from now on, or have ended; none: all are alive."""
        try:
            store = self._connect()
            before = [self._read(store, rank) for rank in range(self.world)]
            time.sleep(patience)
            after = [self._read(store, rank) for rank in range(self.world)]
        except RuntimeError:
            return "the process that keeps the ranks' store (the launcher, or rank 0) has died"
        others = [rank for rank in range(self.world) if rank != self.rank]
        for ranks, what in (
            ([rank for rank in others if before[rank] == after[rank] != LEFT], "died"),
            ([rank for rank in others if after[rank] == LEFT], "ended"),
        ):
            if ranks:
                whom = f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} have"
                return f"{whom} {what}"
        return None


@contextmanager
def naming_the_lost(heart: Heartbeat | None) -> Iterator[None]:
    """Turn a transfer that fails into PeerLost with the names of the ranks that are silent."""
    try:
        yield
    except PeerLost as error:
        raise _named(heart, error) from error
    except RuntimeError as error:
        if heart is None or isinstance(error, LwmError):
            raise
        if not any(word in str(error).lower() for word in LOST_WORDS):
            raise
        raise _named(heart, error) from error


def _named(heart: Heartbeat | None, error: Exception) -> PeerLost:
    gone = None if heart is None else heart.gone()
    if gone is not None:
        return PeerLost(
            f"trainer 'torch': {gone}; what was said there last tells why. Continue with lwm resume", details=str(error)
        )
    if isinstance(error, PeerLost):
        return error
    return PeerLost(
        f"trainer 'torch': a transfer between ranks failed ({str(error).splitlines()[0]}), though all are alive; look "
        "at what the others said last", details=str(error),
    )  # fmt: skip
