"""The coordinator's side of a worker of several ranks: every request goes to all of them at once."""

from __future__ import annotations

from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench_process import Worker


class Ranks:
    """``world`` processes of one script that answer as one; use it in a ``with`` block, at whose end they are gone.

    Args:
        name: what messages call it.
        python: the interpreter.
        script: the file that serves.
        case: told to every rank, with its ``rank``, the ``world``, the ``store`` where they meet, and ``threads``.
        world: how many.
        threads: of each.
    """

    def __init__(
        self, name: str, python: str, script: Path, case: dict[str, Any], world: int = 1, threads: int = 1
    ) -> None:
        shared = {**case, "world": world, "threads": threads, "store": str(Path(case["folder"]) / f"{name}.store")}
        self._open, self._pool = ExitStack(), ThreadPoolExecutor(world)
        with ExitStack() as stack:  # should one of them not start, the others end
            self._workers = [
                stack.enter_context(Worker(f"{name}-{rank}", python, script, {**shared, "rank": rank}))
                for rank in range(world)
            ]
            self._open = stack.pop_all()

    def ask(self, do: str, **arguments: Any) -> list[dict[str, Any]]:
        """One request and the replies of all ranks, in order.

        Raises:
            LwmError: of the first rank that raised or ended; the others may then wait for it for ever.
        """
        asked = [self._pool.submit(worker.ask, do, **arguments) for worker in self._workers]
        done, _ = wait(asked, return_when=FIRST_EXCEPTION)
        for answer in done:
            answer.result()  # raises what it raised
        return [answer.result() for answer in asked]

    def seconds(self, **arguments: Any) -> float:
        """Of the slowest rank."""
        return max(float(reply["seconds"]) for reply in self.ask("time", **arguments))

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        self._pool.shutdown()
