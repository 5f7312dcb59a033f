"""Processes of one test, over a socket of this machine: rank 0 hears every other, and answers all."""

from __future__ import annotations

import json
import os
import time
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

from lwm_core.errors import LwmError
from lwm_core.launched import launched
from lwm_core.protocols import ALONE, Processes

_PATIENCE = 30.0  # seconds that a process may take to start


class Siblings:
    """See ``lwm_core.protocols.Processes``. That all call the same at the same time is checked with every call."""

    def __init__(self, rank: int, world: int, address: str) -> None:
        self.rank, self.world = rank, world
        self._connections: list[Connection] = []
        if rank == 0:
            with Listener(address, "AF_UNIX") as listener:
                found = dict(_greeted(listener) for _ in range(world - 1))
            self._connections = [found[one] for one in range(1, world)]
        else:
            self._connections = [_connected(address)]
            self._connections[0].send(rank)

    def share(self, value: Any) -> Any:
        text = json.dumps(value) if self.rank == 0 else None
        return json.loads(self.gather("share", text)[0])

    def largest(self, value: int) -> int:
        assert isinstance(value, int) and 0 <= value < 2**62, value
        return max(self.gather("largest", value))

    def gather(self, what: str, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks, on every rank."""
        try:
            if self.rank > 0:
                self._connections[0].send((what, value))
                answer = self._connections[0].recv()
            else:
                said = [(what, value), *(one.recv() for one in self._connections)]
                calls = [call for call, _ in said]
                answer = [one for _, one in said] if len(set(calls)) == 1 else f"not in step: {calls}"
                for one in self._connections:
                    one.send(answer)
        except (EOFError, OSError) as error:
            raise LwmError(f"a sibling of rank {self.rank} is gone") from error
        assert isinstance(answer, list), answer
        return answer


def join() -> Processes:
    """The processes that the environment tells of."""
    rank, world = launched()
    return ALONE if world == 1 else Siblings(rank, world, os.environ["STANDIN_SOCKET"])


def _greeted(listener: Listener) -> tuple[int, Connection]:
    connection = listener.accept()
    return connection.recv(), connection


def _connected(address: str) -> Connection:
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            return Client(address, "AF_UNIX")
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.01)
