"""Rank processes on this machine, kept between calls: what the harness sends work to.

A rank that dies, hangs or fails alone leaves the others inside a transfer; the pool then waits a moment for what they
have to say, ends them all, and starts afresh at the next call.
"""

from __future__ import annotations

import atexit
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from lwm_core import errors
from lwm_core.errors import LwmError, ShapeError, UnsupportedError
from lwm_core.testing import wire

SECONDS = 240.0
"""That a call, or a transfer between ranks, may take."""

GRACE = 10.0
"""Seconds that the other ranks have to answer after one has failed."""

Reply = tuple[wire.Header, wire.Arrays]


class RankError(LwmError):
    """A rank process died, hung, or raised what it should not; ``details`` holds its own words."""


class RankPool:
    """``world`` processes that form a gloo group."""

    def __init__(self, world: int, seconds: float = SECONDS) -> None:
        self.world, self._seconds = world, seconds
        self._folder = tempfile.TemporaryDirectory(prefix="lwm-ranks-")
        self._replies: queue.Queue[tuple[int, Reply | None]] = queue.Queue()
        self.processes = [self._start(rank) for rank in range(world)]
        for rank in range(world):
            threading.Thread(target=self._read, args=(rank, self._replies), daemon=True).start()

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        folder = Path(self._folder.name)
        words = (str(rank), str(self.world), str(folder / "store"), str(self._seconds))
        path = os.pathsep.join(entry for entry in sys.path if entry)
        with open(folder / f"rank-{rank}.log", "wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "lwm_torch_ring.attention.rank", *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )

    def _read(self, rank: int, replies: queue.Queue[tuple[int, Reply | None]]) -> None:
        stream = cast(BinaryIO, self.processes[rank].stdout)
        with suppress(EOFError, OSError, ValueError):
            while (message := wire.receive(stream)) is not None:
                replies.put((rank, message))
        replies.put((rank, None))

    @property
    def alive(self) -> bool:
        """Whether all ranks run."""
        return all(process.poll() is None for process in self.processes)

    def ask(self, header: Mapping[str, Any], shards: Sequence[wire.Arrays]) -> list[Reply]:
        """Send every rank its request and return their replies in order.

        Raises:
            LwmError: as a rank raised it.
            RankError: a rank died, gave no answer in time, or raised something else; the message names it.
        """
        for process, arrays in zip(self.processes, shards, strict=True):
            with suppress(OSError):  # one that is gone is told below
                wire.send(cast(BinaryIO, process.stdin), header, arrays)
        replies, deadline = dict[int, Reply | None](), time.monotonic() + self._seconds
        while len(replies) < self.world:
            try:
                rank, reply = self._replies.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            replies[rank] = reply
            if reply is None or "error" in reply[0]:
                deadline = min(deadline, time.monotonic() + GRACE)
        failure = self._failure(replies, str(header["do"]))
        if failure is not None:
            told_alike = len(replies) == self.world and all(r and "error" in r[0] for r in replies.values())
            if not (told_alike and isinstance(failure, (UnsupportedError, ShapeError))):
                self.close()
            raise failure
        return [cast(Reply, replies[rank]) for rank in range(self.world)]

    def _failure(self, replies: Mapping[int, Reply | None], do: str) -> LwmError | None:
        """What to raise: a death before an error, an error before what it brought on others, silence last."""
        for rank, reply in sorted(replies.items()):
            if reply is None:
                code = self.processes[rank].wait()
                return self._dead(rank, f"ended with exit code {code} during {do!r}")
        told = [(rank, reply[0]["error"]) for rank, reply in sorted(replies.items()) if reply and "error" in reply[0]]
        for rank, error in sorted(told, key=lambda one: "PeerLost" in one[1]["types"]):
            return _rebuilt(rank, error)
        silent = sorted(set(range(self.world)) - set(replies))
        return self._dead(silent[0], f"gave no answer to {do!r} in {self._seconds:g} s") if silent else None

    def _dead(self, rank: int, what: str) -> RankError:
        log = (Path(self._folder.name) / f"rank-{rank}.log").read_text(errors="replace").strip()
        last = f": {log.splitlines()[-1]}" if log else ""
        return RankError(f"torch-ring: rank {rank} of {self.world} {what}{last}", details=log)

    def close(self) -> None:
        """End all ranks: by the end of their input, by force where that does not help."""
        for process in self.processes:
            with suppress(OSError):
                cast(BinaryIO, process.stdin).close()
        deadline = time.monotonic() + 2.0
        for process in self.processes:
            try:
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._folder.cleanup()


def _rebuilt(rank: int, error: Mapping[str, Any]) -> LwmError:
    """The exception that a rank told of: of its own class where that is the core's, else a RankError."""
    message, details = error["message"], error["details"]
    cls = getattr(errors, error["types"][0], None)
    if isinstance(cls, type) and issubclass(cls, LwmError):
        return cls(message, details=details)
    return RankError(f"torch-ring: rank {rank}: {error['types'][0]}: {message}", details=details)


_pools: dict[int, RankPool] = {}


def rank_pool(world: int) -> RankPool:
    """The pool of this process for ``world`` ranks; a fresh one where there is none or one of its ranks is gone."""
    if world not in _pools or not _pools[world].alive:
        if world in _pools:
            _pools.pop(world).close()
        _pools[world] = RankPool(world)
    return _pools[world]


def close_pools() -> None:
    """End every rank process of this process."""
    while _pools:
        _pools.popitem()[1].close()


atexit.register(close_pools)
