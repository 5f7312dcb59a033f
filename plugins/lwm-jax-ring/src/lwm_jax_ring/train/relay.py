"""The way to process 0's store leads through a relay in this very process.

JAX aborts a process with a stack trace as soon as its connection to process 0 breaks. The relay keeps JAX's end open
instead, and tells the heartbeat, which ends the process in one line.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

IDLE, INTERVAL, PROBES = 10, 5, 4
"""Seconds of silence, then between questions, and how many unanswered ones mean that the other host is gone."""

PATIENCE = 5.0
"""Seconds that a new connection may take."""

TRIES, BETWEEN = 20, 0.1
"""How often, and after how many seconds, process 0 must take a new connection to count as alive."""


class Relay:
    """Takes connections at :attr:`address` and carries their bytes to ``host:port`` and back.

    Args:
        host, port: of process 0.
        lost: called once, from a side thread, when process 0 is found gone after :meth:`watch`.
    """

    def __init__(self, host: str, port: int, lost: Callable[[], None]) -> None:
        self._where, self._lost = (host, port), lost
        self._watching = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._side(self._take)

    def watch(self) -> None:
        """From now on a connection that process 0 closes, and none that it takes anew, means that it is gone."""
        self._watching = True

    @staticmethod
    def _side(work: Callable[..., None], *arguments: object) -> None:
        threading.Thread(target=work, args=arguments, name="lwm-relay", daemon=True).start()

    def _take(self) -> None:
        while True:
            near, _ = self._listener.accept()
            self._side(self._carry, near)

    def _connect(self) -> socket.socket | None:
        with suppress(OSError):
            far = socket.create_connection(self._where, PATIENCE)
            far.settimeout(None)
            far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            far.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in (
                ("TCP_KEEPIDLE", IDLE), ("TCP_KEEPINTVL", INTERVAL), ("TCP_KEEPCNT", PROBES),
                ("TCP_USER_TIMEOUT", 1000 * (IDLE + INTERVAL * PROBES)),
            ):  # fmt: skip
                if hasattr(socket, name):  # not every system has them all
                    far.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            return far
        return None

    def _carry(self, near: socket.socket) -> None:
        far = self._connect()
        if far is None:
            if not self._watching:
                near.close()  # process 0 has not come yet; JAX tries again
            else:
                self._lost()
            return
        self._side(_pour, near, far)
        _pour(far, near, closing=False)  # ends when process 0 has closed its end, or this process its own
        if self._watching and self._gone():
            self._lost()
            return
        near.close()
        far.close()

    def _gone(self) -> bool:
        """Whether process 0 takes no connection any more. One that was killed may take some until all of it is gone."""
        for _ in range(TRIES):
            again = self._connect()
            if again is None:
                return True
            again.close()
            time.sleep(BETWEEN)
        return False


def _pour(source: socket.socket, sink: socket.socket, closing: bool = True) -> None:
    with suppress(OSError):
        while content := source.recv(1 << 16):
            sink.sendall(content)
    if closing:
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)
