"""An attention backend by name on so many devices, NumPy in and out: :func:`attention_harness`.

A framework's device count is fixed once it has started, so each (plugin, world) lives in a worker process of its own,
which is started on first use, kept (starting a framework and compiling cost seconds) and ended with this process.

Shapes: B batch, S sequence, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

import atexit
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from lwm_core import errors
from lwm_core.attention import AttentionMask
from lwm_core.errors import LwmError, PluginError, ShapeError
from lwm_core.testing import wire

#: Seconds that one call may take, compilation included; ``LWM_TESTING_TIMEOUT`` sets another limit.
TIMEOUT = 300.0

_STDERR_TAIL = 2000


class WorkerError(LwmError):
    """A worker process died, hung, or its backend raised what it should not; ``details`` holds its own words."""


class Worker:
    """One worker process; a request at a time."""

    def __init__(self, name: str, world: int, search_path: tuple[str, ...]) -> None:
        self._label = f"attention worker {name!r} (world {world})"
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker, closed in close()
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lwm_core.testing.worker", name, str(world)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(search_path)},
            start_new_session=True,  # so that its own child processes can be ended with it
        )
        self._replies: queue.Queue[tuple[wire.Header, wire.Arrays] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def ask(self, header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]] | None = None) -> wire.Arrays:
        """Send a request and return the arrays of its reply.

        Raises:
            LwmError, NotImplementedError or ValueError: as the backend raised it.
            WorkerError: the backend raised something else, or the process died or took too long.
        """
        limit = float(os.environ.get("LWM_TESTING_TIMEOUT", TIMEOUT))
        with self._lock:
            try:
                wire.send(cast(BinaryIO, self._process.stdin), header, arrays)
                reply = self._replies.get(timeout=limit)
            except queue.Empty:
                self._kill()
                raise self._failure(f"gave no answer to {header['do']!r} in {limit:g} s and was ended") from None
            except OSError:
                reply = None
            if reply is None:
                self._kill()
                raise self._failure(f"ended with exit code {self._process.wait()} during {header['do']!r}")
        if "error" in reply[0]:
            raise _rebuilt(self._label, reply[0]["error"])
        return reply[1]

    def close(self) -> None:
        """End the process: by the end of its input, by force where that does not help."""
        with suppress(OSError, subprocess.TimeoutExpired):
            cast(BinaryIO, self._process.stdin).close()
            self._process.wait(timeout=10)
        self._kill()

    def _read(self) -> None:
        stream = cast(BinaryIO, self._process.stdout)
        with suppress(EOFError, OSError, ValueError):
            while (message := wire.receive(stream)) is not None:
                self._replies.put(message)
        self._replies.put(None)

    def _kill(self) -> None:
        # The group, not the process alone: a backend's own ranks may outlive the worker.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _failure(self, what: str) -> WorkerError:
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - _STDERR_TAIL))
        tail = self._stderr.read().decode(errors="replace").strip()
        last = f": {tail.splitlines()[-1]}" if tail else ""
        return WorkerError(f"{self._label} {what}{last}", details=tail)


def _rebuilt(label: str, error: Mapping[str, Any]) -> Exception:
    """The exception that a worker told of: of its own class where that is ours or built in, else a WorkerError."""
    message, details = error["message"], error["details"]
    for name in error["types"]:
        cls = getattr(errors, name, None)
        if isinstance(cls, type) and issubclass(cls, LwmError):
            return cls(message, details=details)
        if name in ("NotImplementedError", "ValueError"):
            plain: Exception = {"NotImplementedError": NotImplementedError, "ValueError": ValueError}[name](message)
            plain.add_note(details)
            return plain
    return WorkerError(f"{label}: {error['types'][0]}: {message}", details=details)


class RemoteHarness:
    """A backend in a worker process; see :class:`lwm_core.protocols.AttentionHarness`. A context manager."""

    def __init__(self, worker: Worker, options: Mapping[str, object]) -> None:
        self._worker = worker
        self._options = dict(options)
        self._worker.ask({"do": "open", "options": self._options})

    def forward(
        self, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], mask: AttentionMask,
        segment_ids: NDArray[np.integer] | None = None,
    ) -> tuple[NDArray[Any], NDArray[np.float32]]:  # fmt: skip
        """Attention of ``q [B,S,H,D]`` over ``k, v [B,S,K,D]``, all in natural order.

        Returns:
            ``out [B,S,H,D]`` and the natural-log ``lse [B,S,H]``.

        Raises:
            NotImplementedError: the backend does not support this; the message says what.
            ShapeError: the length does not divide.
            WorkerError: the worker died or hung, or the backend failed.
        """
        reply = self._ask("forward", {"q": q, "k": k, "v": v}, mask, segment_ids)
        return reply["out"], reply["lse"]

    def backward(
        self, q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], mask: AttentionMask, dout: NDArray[Any],
        segment_ids: NDArray[np.integer] | None = None,
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:  # fmt: skip
        """``dq, dk, dv`` of ``sum(out · dout)``, in the shapes of q, k and v. Raises as :meth:`forward` does."""
        reply = self._ask("backward", {"q": q, "k": k, "v": v, "dout": dout}, mask, segment_ids)
        return reply["dq"], reply["dk"], reply["dv"]

    def close(self) -> None:
        """Let the worker drop this backend; the process stays for other options."""
        if self._worker.alive:
            self._worker.ask({"do": "close", "options": self._options})

    def __enter__(self) -> RemoteHarness:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ask(
        self, do: str, arrays: dict[str, NDArray[Any]], mask: AttentionMask, segment_ids: NDArray[np.integer] | None
    ) -> wire.Arrays:
        if segment_ids is not None:
            arrays["segment_ids"] = np.asarray(segment_ids)
        return self._worker.ask({"do": do, "options": self._options, "mask": asdict(mask)}, arrays)


_workers: dict[tuple[str, int, tuple[str, ...]], Worker] = {}


def attention_harness(name: str, world: int = 1, **options: Any) -> RemoteHarness:
    """The attention plugin ``name`` with ``options`` on ``world`` devices, in a worker process that is kept for reuse.

    Raises:
        PluginError: the plugin is not installed or cannot be used.
        NotImplementedError: the backend does not support these options; the message says which.
        ShapeError: ``world`` is not positive.
    """
    if world < 1:
        raise ShapeError(f"attention_harness({name!r}): world is {world}; expected at least 1 device")
    # The worker finds what this process finds, a plugin's source folder on sys.path included.
    key = (name, world, tuple(entry for entry in sys.path if entry))
    if key not in _workers or not _workers[key].alive:
        _workers[key] = Worker(*key)
    try:
        return RemoteHarness(_workers[key], options)
    except PluginError:
        _workers.pop(key).close()
        raise


def close_workers() -> None:
    """End every worker process of this process; the next :func:`attention_harness` starts a fresh one."""
    while _workers:
        _workers.popitem()[1].close()


atexit.register(close_workers)
