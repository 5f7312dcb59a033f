"""Real processes that run one command together, as a launcher would start them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PRELUDE = """
import os, sys
rank = int(os.environ["RANK"])
def guard(event, facts):
    writes = {"open": lambda path, mode, flags: flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT), "os.mkdir": None,
              "os.rename": None, "os.remove": None, "os.rmdir": None, "os.truncate": None}
    if event not in writes or not isinstance(facts[0], (str, bytes, os.PathLike)):
        return
    path = os.path.abspath(os.fsdecode(facts[0]))
    if path.startswith(folder) and "/trainer/" not in path and (writes[event] is None or writes[event](*facts)):
        os.write(2, f"rank {rank} wrote {path} ({event})\\n".encode())
        os._exit(77)
folder = os.environ["GUARDED"]
if rank:
    sys.addaudithook(guard)
"""
"""Of all ranks but 0, a process that writes to the run's folder ends with code 77; its trainer's files are its own."""

MAIN = "import sys; from lwm_core.cli import main; sys.exit(main())"


@dataclass(frozen=True)
class Ended:
    """How one process of several ended."""

    code: int
    out: str
    err: str


class Together:
    """The ``lwm`` command in several processes. ``prelude`` is code that each runs first; it knows its ``rank``."""

    def __init__(self, lwm: Any) -> None:
        self.cwd: Path = lwm.cwd
        self._env = lwm.env
        self._sockets = Path(tempfile.mkdtemp(prefix="lwm"))  # the name of a socket must be short
        self._started: list[subprocess.Popen[str]] = []
        self._count = 0

    def start(self, world: int, *words: str, prelude: str = "", **env: str) -> list[subprocess.Popen[str]]:
        self._count += 1
        shared = {
            **self._env, "WORLD_SIZE": str(world), "STANDIN_SOCKET": str(self._sockets / str(self._count)),
            "GUARDED": str(self.cwd / "r"), **env,
        }  # fmt: skip
        code = "\n".join((PRELUDE, prelude, MAIN))
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", code, *words], cwd=self.cwd, env={**shared, "RANK": str(rank)}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
            for rank in range(world)
        ]  # fmt: skip
        self._started += processes
        return processes

    def ended(self, processes: list[subprocess.Popen[str]], timeout: float = 90.0) -> list[Ended]:
        """Wait for all; one that does not end fails the test."""
        end = time.monotonic() + timeout
        told = []
        for rank, process in enumerate(processes):
            try:
                out, err = process.communicate(timeout=max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                pytest.fail(f"rank {rank} of {len(processes)} hangs; the others so far: {told}")
            told.append(Ended(process.returncode, out, err))
        return told

    def __call__(self, world: int, *words: str, prelude: str = "", **env: str) -> list[Ended]:
        return self.ended(self.start(world, *words, prelude=prelude, **env))

    def close(self) -> None:
        for process in self._started:
            process.kill()
            process.communicate()
        shutil.rmtree(self._sockets)


@pytest.fixture
def together_run(lwm: Any) -> Iterator[Together]:
    made = Together(lwm)
    yield made
    made.close()


@pytest.fixture
def whole(lwm: Any) -> Callable[..., Path]:
    """Runs a recipe undisturbed in one process, in ``whole``."""

    def run(path: Path) -> Path:
        done = lwm("run", str(path), "--out", "whole")
        assert done.returncode == 0, done.stderr
        return Path(os.fspath(lwm.cwd)) / "whole"

    return run
