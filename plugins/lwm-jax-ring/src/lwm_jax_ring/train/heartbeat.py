"""Who of the processes is still alive, told over the store through which they have met.

A process counts up a number in the store every second. One whose number stands still for long has died or its host is
gone: whoever notices writes that down, and all end with its name. That is the last resort: a transfer that fails
(``naming_the_lost``) asks at once whose numbers stand still, and that process 0 is gone, its closed connection tells.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import jax

from lwm_core.errors import LwmError
from lwm_jax_ring.train.store import Store, StoreGone

INTERVAL = 1.0
"""Seconds between two beats."""

SILENCE = 30.0
"""Seconds without a beat of its neighbour after which a process takes it for lost."""

FAREWELL = 10.0
"""Seconds that process 0, which keeps the store, waits at its end for the others to end."""

VERDICT = "lwm/lost"
LEFT = "left"


class PeerLost(LwmError):
    """A transfer did not come about, most often since another process has died."""


class Heartbeat:
    """The beats of one process and a watch over its neighbour.

    Args:
        rank, world: this process among all.
    """

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.lost: str | None = None
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lwm-heartbeat", daemon=True)
        self._store: Store | None = None

    def start(self, store: Store) -> None:
        """Begin to beat."""
        self._store = store
        store.put(_key(self.rank), "0")
        self._thread.start()

    def leave(self) -> None:
        """Leave in good order: from now on silence means nothing. Rank 0 goes last, for it keeps the store."""
        if self._store is None:
            return
        self._leaving.set()
        self._thread.join(5 * INTERVAL)
        with suppress(StoreGone):
            self._store.put(_key(self.rank), LEFT)
            if self.rank == 0 and self.lost is None:
                self._store.wait_alone(self.world, FAREWELL)
        jax.distributed.shutdown()

    def _run(self) -> None:
        assert self._store is not None
        beats, seen, since = 0, None, time.monotonic()
        neighbour = (self.rank + 1) % self.world
        try:
            while not self._leaving.wait(INTERVAL):
                beats += 1
                self._store.put(_key(self.rank), str(beats))
                verdict = self._store.get(VERDICT)
                if verdict is not None:
                    self._end(verdict)
                now = self._store.get(_key(neighbour))
                if now != seen or now == LEFT:
                    seen, since = now, time.monotonic()
                elif time.monotonic() - since > SILENCE:
                    verdict = f"rank {neighbour} has died: nothing was heard of it for {SILENCE:.0f} seconds"
                    self._store.put(VERDICT, verdict)
                    self._end(verdict)
        except StoreGone:
            self.keeper_gone()

    def keeper_gone(self) -> None:
        """Process 0 is gone, and the store with it."""
        if not self._leaving.wait(INTERVAL):  # it may be that all are ending
            self._end("rank 0 has died, or has ended before this one")

    def _end(self, verdict: str) -> None:
        """End the process from its side thread: its main thread may wait for the lost one for ever."""
        print(f"error: rank {self.rank}: {_line(verdict)}", file=sys.stderr, flush=True)
        os._exit(1)

    def gone(self, patience: float = 4 * INTERVAL) -> str | None:
        """Which ranks do not beat for ``patience`` seconds from now on, or have left; none: all are alive."""
        assert self._store is not None
        others = [rank for rank in range(self.world) if rank != self.rank]
        try:
            before = [self._store.get(_key(rank)) for rank in range(self.world)]
            time.sleep(patience)
            after = [self._store.get(_key(rank)) for rank in range(self.world)]
        except StoreGone:
            return "rank 0 has died"
        for ranks, what in (
            ([rank for rank in others if before[rank] == after[rank] != LEFT], "died"),
            ([rank for rank in others if after[rank] == LEFT], "ended"),
        ):
            if ranks:
                whom = f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} have"
                return f"{whom} {what}"
        return None

    def condemn(self, verdict: str) -> None:
        """Have all others end with ``verdict``. This process tells it by itself, and has a while to end in order."""
        assert self._store is not None
        self.lost = verdict
        self._leaving.set()
        with suppress(StoreGone):
            self._store.put(VERDICT, verdict)
        last = threading.Timer(FAREWELL, self._end, (verdict,))
        last.daemon = True
        last.start()

    def check(self) -> None:
        """Raises PeerLost once a process is known to be lost."""
        if self.lost is not None:
            raise PeerLost(_line(self.lost))

    def left(self, rank: int) -> bool:
        """Whether a rank has ended in good order."""
        assert self._store is not None
        return self._store.get(_key(rank)) == LEFT


def _line(verdict: str) -> str:
    return f"trainer 'jax': {verdict}; what was said there last tells why. Continue with lwm resume"


def _key(rank: int) -> str:
    return f"lwm/beat/{rank}"


@contextmanager
def naming_the_lost(heart: Heartbeat | None) -> Iterator[None]:
    """Turn a transfer that fails into PeerLost with the names of the ranks that are silent."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, StoreGone) as error:
        if heart is None or str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        gone = heart.gone()
        if gone is None:
            raise
        heart.condemn(gone)
        raise PeerLost(_line(gone), details=str(error)) from error
