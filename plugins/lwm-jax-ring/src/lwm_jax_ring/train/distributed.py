"""The processes of a run: joined by ``jax.distributed`` where a launcher has started several, and what they tell each
other beside what a compiled step exchanges."""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax

from lwm_core.errors import UsageError
from lwm_core.launched import launched
from lwm_core.protocols import ALONE, Processes
from lwm_jax_ring.train.heartbeat import Heartbeat, PeerLost, naming_the_lost
from lwm_jax_ring.train.relay import Relay
from lwm_jax_ring.train.store import Store, quiet_service

SLICE = 2.0
"""Seconds of one wait for another process; whoever waits longer looks whether it is still there."""

KEPT = 64
"""Shared words that may lie in the store at most before rank 0 knows that all have read them."""

_joined: list[JaxProcesses] = []


class JaxProcesses:
    """See ``lwm_core.protocols.Processes``.

    Args:
        rank, world: this process among all.
        store: where they leave each other words.
        heart: knows who is alive.
    """

    def __init__(self, rank: int, world: int, store: Store, heart: Heartbeat) -> None:
        self.rank, self.world, self.heart = rank, world, heart
        self._store = store
        self._number = self._told = self._dropped = 0

    def share(self, value: Any) -> Any:
        """Rank 0's JSON-able value, on every rank; raises PeerLost."""
        with naming_the_lost(self.heart):
            said = self._tell(json.dumps(value)) if self.rank == 0 else self._hear(self._next(), 0)
        self._told += 1
        if self._told % KEPT == 0:
            self.largest(0)
        return json.loads(said)

    def largest(self, value: int) -> int:
        """The largest of all ranks' values; raises PeerLost."""
        with naming_the_lost(self.heart):
            asked = self._next()
            if self.rank > 0:
                self._store.put(f"{asked}/{self.rank}", str(value))
                return int(self._hear(self._next(), 0))
            found = max(value, *(int(self._hear(f"{asked}/{rank}", rank)) for rank in range(1, self.world)))
            for number in range(self._dropped, self._number):  # all have come this far, so they have read those
                self._store.drop(f"lwm/word/{number}")
            self._dropped = self._number
            return int(self._tell(str(found)))

    def hosts(self) -> int:
        """On how many hosts they are; every process asks at once."""
        name = socket.gethostname()
        with naming_the_lost(self.heart):
            asked = self._next()
            if self.rank > 0:
                self._store.put(f"{asked}/{self.rank}", name)
                return int(self.share(None))
            return int(self.share(len({name, *(self._hear(f"{asked}/{r}", r) for r in range(1, self.world))})))

    def _next(self) -> str:
        self._number += 1
        return f"lwm/word/{self._number - 1}"

    def _tell(self, word: str) -> str:
        self._store.put(self._next(), word)
        return word

    def _hear(self, key: str, speaker: int) -> str:
        """What ``speaker`` says, however long it takes, for as long as it is there."""
        left = False
        self.heart.check()
        while (word := self._store.wait(key, SLICE)) is None:
            if left:
                raise PeerLost(f"trainer 'jax': rank {speaker} has ended; what was said there last tells why")
            left = self.heart.left(speaker)
            self.heart.check()
        return word


def join(timeout: int, host_devices: int | None) -> Processes:
    """Join the other processes, if a launcher started some. Nothing may have touched a device before.

    Args:
        timeout: seconds to wait for them; this process ends if they do not come.
        host_devices: that a CPU stands for in this process, if it is a CPU's.

    Raises:
        UsageError: it is not known where they meet, the port there is taken, or JAX has started before.
    """
    rank, world = launched()
    if world == 1:
        return ALONE
    if _joined:
        return _joined[0]
    host, port = meeting_place(os.environ)
    if rank == 0:
        _check_free(port)
    heart = Heartbeat(rank, world)
    relay = None if rank == 0 else Relay(host, port, heart.keeper_gone)
    quiet_service()
    level = jax.config.jax_logging_level
    jax.config.update("jax_logging_level", "ERROR")  # JAX warns of what quiet_service has chosen
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if host_devices is not None:
        _before_start(lambda: jax.config.update("jax_num_cpu_devices", host_devices))
    local = os.environ.get("LOCAL_RANK") if os.environ.get("LOCAL_WORLD_SIZE", "1") != "1" else None
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    with _impatience(timeout, address, rank):
        _before_start(
            lambda: jax.distributed.initialize(
                address if relay is None else relay.address,
                world,
                rank,
                # A launcher of one process a device gives each its own; what JAX_LOCAL_DEVICE_IDS says goes first.
                local_device_ids=None if local is None or "JAX_LOCAL_DEVICE_IDS" in os.environ else int(local),
                cluster_detection_method="deactivate",
                initialization_timeout=timeout + 60,
            )
        )
    if relay is not None:
        relay.watch()
    else:  # rank 0 alone speaks
        for one in ("WARNING", level):
            jax.config.update("jax_logging_level", one)
    if jax.default_backend() == "cpu":
        _keep_output()
    store = Store()
    heart.start(store)
    processes = JaxProcesses(rank, world, store, heart)
    _joined.append(processes)
    atexit.register(heart.leave)  # before JAX's own end, which was registered earlier
    return processes


def _keep_output() -> None:
    """Leave file descriptor 1 to gloo, which writes a line there about each group of devices that meet."""
    if sys.stdout is None or sys.stdout is not sys.__stdout__:
        return
    sys.stdout.flush()
    own = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    sys.stdout = sys.__stdout__ = own


def _check_free(port: int) -> None:
    """Rank 0 is to listen there; JAX would crash if it cannot."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("", port))
        except OSError as error:
            raise UsageError(
                f"trainer 'jax': rank 0 cannot listen on port {port} ({error.strerror}); set MASTER_PORT to a free one"
            ) from error


@contextmanager
def _impatience(seconds: float, where: str, rank: int) -> Iterator[None]:
    """End the process in one line if what is done takes longer; JAX would abort it with a stack trace."""

    def end() -> None:
        print(
            f"error: rank {rank}: trainer 'jax': not all processes came to {where} within {seconds} seconds; start all "
            "of them with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE, or raise trainer.join_timeout",
            file=sys.stderr,
            flush=True,
        )
        os._exit(UsageError.exit_code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _before_start(step: Callable[[], None]) -> None:
    try:
        step()
    except RuntimeError as error:
        told = str(error).splitlines()[0]
        raise UsageError(f"trainer 'jax': the processes cannot be joined: {told}") from error


def meeting_place(environment: Mapping[str, str]) -> tuple[str, int]:
    """Host and port of process 0, from the variables that a launcher sets.

    Raises:
        UsageError: they are not set, or are no address.
    """
    given = environment.get("JAX_COORDINATOR_ADDRESS")
    if not given:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
        if missing:
            raise UsageError(
                f"trainer 'jax': {' and '.join(missing)} not set, but WORLD_SIZE is {environment.get('WORLD_SIZE')}; "
                "set MASTER_ADDR and MASTER_PORT to the host of rank 0 and a free port there, or "
                "JAX_COORDINATOR_ADDRESS to HOST:PORT"
            )
        given = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    host, _, port = given.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UsageError(f"trainer 'jax': processes are to meet at {given!r}; expected HOST:PORT")
    return host.strip("[]"), int(port)


def check_alone() -> None:
    """One process was started, as far as a launcher has said.

    Raises:
        UsageError: JAX says that it is one of several.
    """
    if jax.process_count() > 1:
        raise UsageError(
            f"trainer 'jax': JAX runs as process {jax.process_index()} of {jax.process_count()}, but RANK and "
            "WORLD_SIZE are not set; set both, MASTER_ADDR and MASTER_PORT in every process"
        )
