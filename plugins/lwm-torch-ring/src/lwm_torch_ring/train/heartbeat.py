"""Who of the ranks is still alive, told over the store through which they have met.

A rank counts up a number in the store every second. A rank whose number stands still for long has died or its host is
gone: whoever notices writes that down, and all ranks end with its name. Transfers between GPUs may wait for ever, so
this is what ends them; a transfer that fails (``naming_the_lost``) asks at once whose numbers stand still. A rank that
fails stops to count, whatever its threads still wait for.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lwm_core.errors import LwmError
from lwm_torch_ring.attention.peers import PeerLost

INTERVAL = 1.0
"""Seconds between two beats."""

SILENCE = 20.0
"""Seconds without a beat of its neighbour, or without an answer of the store, after which a rank takes it for lost. A
launcher that has noticed first gives the others 30 seconds."""

ANSWER = 5.0
"""Seconds that the store has for an answer."""

KEEPER = "the process that keeps the ranks' store (the launcher, or rank 0)"
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
        self.failed = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lwm-heartbeat", daemon=True)
        self._store: Any = None
        self._seen = ""
        self._answered = self._heard = 0.0

    def start(self) -> None:
        """Begin to beat."""
        self._store = self._connect()
        self._store.set(self._key(self.rank), "0")
        self._thread.start()

    def stop(self) -> None:
        """Leave in good order, so that silence means nothing from now on; after :meth:`fail`, just end the thread.

        A process must not end while the thread is inside torch.
        """
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(4 * ANSWER)

    def fail(self) -> None:
        """Beat no more, so that the others see that this rank is lost to them."""
        self.failed = True
        self._stopped.set()

    def _connect(self) -> Any:
        address, port = self._where
        try:  # torch would log a stack of its own where nobody listens
            socket.create_connection((address, port), ANSWER).close()
        except OSError as error:
            raise RuntimeError(f"{address}:{port}: {error}") from error
        return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=ANSWER), wait_for_workers=False)

    @staticmethod
    def _key(rank: int) -> str:
        return f"lwm/beat/{rank}"

    def _run(self) -> None:
        self._answered = self._heard = time.monotonic()
        beats = 0
        while not self._stopped.wait(INTERVAL):
            beats += 1
            try:
                self._beat(beats)
                self._answered = time.monotonic()
            except RuntimeError:  # one slow answer is no loss, but the store's process may be gone
                if time.monotonic() - self._answered > SILENCE:
                    self._end(f"{KEEPER} has died")
                self._reconnect()
        if not self.failed:
            with suppress(RuntimeError):
                self._store.set(self._key(self.rank), LEFT)

    def _reconnect(self) -> None:
        if not self._stopped.is_set():
            with suppress(RuntimeError):
                self._store = self._connect()

    def _beat(self, beats: int) -> None:
        self._store.set(self._key(self.rank), str(beats))
        if self._store.check([VERDICT]):
            self._end(self._store.get(VERDICT).decode())
        neighbour = (self.rank + 1) % self.world
        now = self._read(self._store, neighbour)
        if now != self._seen or now == LEFT:
            self._seen, self._heard = now, time.monotonic()
        elif time.monotonic() - self._heard > SILENCE:
            verdict = f"rank {neighbour} has not been heard of for {SILENCE:.0f} seconds"
            self._store.set(VERDICT, verdict)
            self._end(verdict)

    def _read(self, store: Any, rank: int) -> str:
        if not store.check([self._key(rank)]):
            return ""
        beat: str = store.get(self._key(rank)).decode()
        return beat

    def _end(self, verdict: str) -> None:
        """End the process from its side thread: its main thread may wait for the lost rank for ever."""
        if self._stopped.is_set():
            return
        print(f"error: rank {self.rank}: {verdict}; ending", file=sys.stderr, flush=True)
        if self.rank == 0:
            time.sleep(3 * INTERVAL)  # it may keep the store, from which the others are yet to hear of this
        os._exit(1)

    def gone(self, patience: float = 4 * INTERVAL) -> str | None:
        """Which ranks do not beat for ``patience`` seconds from now on, or have ended; none: all are alive."""
        try:
            store = self._connect()
            before = [self._read(store, rank) for rank in range(self.world)]
            time.sleep(patience)
            after = [self._read(store, rank) for rank in range(self.world)]
        except RuntimeError:
            return f"{KEEPER} has died"
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
    """Turn a transfer that fails into PeerLost with the names of the ranks that are silent.

    Whatever is raised, this rank is out of step with the others from now on, and they are to notice.
    """
    try:
        yield
    except BaseException as error:
        transfer = isinstance(error, PeerLost) or (
            isinstance(error, RuntimeError)
            and not isinstance(error, LwmError)
            and any(word in str(error).lower() for word in LOST_WORDS)
        )
        if heart is None or isinstance(error, GeneratorExit):
            raise
        named = _named(heart, error) if transfer else None
        heart.fail()
        if named is None:
            raise
        raise named from error


def _named(heart: Heartbeat, error: BaseException) -> PeerLost:
    gone = heart.gone()
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
