"""The relay to process 0: it tells one that dies from one that closes a connection, and keeps JAX's end open."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from lwm_jax_ring.train import relay as module
from lwm_jax_ring.train.relay import Relay


@pytest.fixture
def carried() -> Iterator[tuple[socket.socket, socket.socket, socket.socket, threading.Event]]:
    """A stand-in for process 0, its end of a carried connection, JAX's end, and what is set when it is lost."""
    server, lost = socket.create_server(("127.0.0.1", 0)), threading.Event()
    relay = Relay("127.0.0.1", server.getsockname()[1], lost.set)
    host, _, port = relay.address.rpartition(":")
    near = socket.create_connection((host, int(port)))
    far, _ = server.accept()
    relay.watch()
    near.sendall(b"beat")
    assert far.recv(4) == b"beat"
    near.settimeout(0.3)
    yield server, far, near, lost
    for one in (server, far, near):
        one.close()


def test_a_process_that_takes_a_while_to_die_is_gone(
    carried: tuple[socket.socket, socket.socket, socket.socket, threading.Event],
) -> None:
    """Its connections close before the port does; JAX would abort if it saw the one that it has."""
    server, far, near, lost = carried
    far.close()
    assert not lost.wait(0.5)
    server.close()
    assert lost.wait(10)
    with pytest.raises(TimeoutError):
        near.recv(1)


def test_a_connection_that_is_closed_alone_is_closed_here_too(
    carried: tuple[socket.socket, socket.socket, socket.socket, threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BETWEEN", 0.01)
    _, far, near, lost = carried
    far.close()
    for _ in range(30):  # it is found closed when there is something to carry
        try:
            near.sendall(b"beat")
            if near.recv(1) == b"":
                break
        except TimeoutError:
            continue
        except ConnectionError:
            break
    else:
        pytest.fail("the near end stays open")
    assert not lost.is_set()
