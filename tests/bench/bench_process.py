"""The coordinator's side of a worker: start it, ask it, end it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from lwm_core.errors import LwmError


class Worker:
    """A worker process that answers JSON lines; use it in a ``with`` block, at whose end it is gone.

    Args:
        name: what messages call it.
        python: the interpreter of its environment.
        script: the file that serves.
        case: told to it as its one argument; what it prints to stderr is kept in ``case["folder"]``.
    """

    def __init__(self, name: str, python: str, script: Path, case: dict[str, Any]) -> None:
        self.name = name
        self._log = Path(case["folder"]) / f"{name}.log"
        # The same clean slate for every worker: what a person has set for JAX would reach one and not the other.
        env = {key: value for key, value in os.environ.items() if not key.startswith(("XLA_", "JAX_", "PYTHONPATH"))}
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    [python, str(script), json.dumps(case)], env={**env, "JAX_PLATFORMS": "cpu"}, text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                )  # fmt: skip
        except OSError as error:
            raise LwmError(f"bench: the worker {name} does not start: {error}") from error

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """One request and its reply.

        Raises:
            LwmError: the worker raised, or ended; its last words are in the message, all of them in ``details``.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            last = (self._told().strip().splitlines() or ["it said nothing"])[-1]
            raise LwmError(f"bench: the worker {self.name} ended with code {code}: {last}", details=self._told())
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise LwmError(f"bench: the worker {self.name} failed at {do!r}: {reply['error']}", details=self._told())
        return reply

    def _told(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # it holds nothing that must be put away
        self._process.communicate()
