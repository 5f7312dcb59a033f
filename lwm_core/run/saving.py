"""Checkpoints that go to disk while training goes on: started after a step, committed once everything is there.

Every rank writes what its trainer holds; rank 0 makes the folder, commits it and removes old ones.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from lwm_core import checkpoint
from lwm_core.checkpoint import TRAINER, RunState
from lwm_core.errors import CheckpointError, EndedElsewhereError
from lwm_core.protocols import Processes, SaveHandle, Trainer
from lwm_core.run.processes import first, together


@dataclass
class _Pending:
    folder: Path
    state: RunState
    handle: SaveHandle
    commit: Future[None] | None = None


class Saver:
    """Saves one checkpoint at a time and keeps the newest ``keep``.

    Args:
        processes: that save together.
        checkpoints: the folder they lie in.
        keep: how many to keep.
        committed: told the path of each when it is complete, on rank 0 in the thread that calls the saver.
    """

    def __init__(self, processes: Processes, checkpoints: Path, keep: int, committed: Callable[[Path], None]) -> None:
        self._processes = processes
        self._checkpoints = checkpoints
        self._keep = keep
        self._committed = committed
        self._pending: _Pending | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lwm-save")

    def save(self, trainer: Trainer, state: RunState) -> None:
        """Start a save on every rank; an earlier one is waited for first.

        Raises:
            CheckpointError: the disk is full, or the trainer cannot write.
        """
        self.wait()
        folder = checkpoint.checkpoint_folder(self._checkpoints, state.step)
        try:
            first(self._processes, lambda: str(checkpoint.prepare(folder)))
            handle = together(self._processes, lambda: trainer.save(folder / TRAINER))
        except Exception as error:
            self._fail(folder, error)
        self._pending = _Pending(folder, state, handle)

    def poll(self) -> None:
        """On rank 0: commit what has reached the disk, without waiting; checksums are taken in a thread."""
        pending = self._pending
        if pending is None:
            return
        if pending.commit is None:
            if pending.handle.done():
                pending.commit = self._thread.submit(_commit, pending)
        elif pending.commit.done():
            self.settle()

    def wait(self) -> None:
        """On every rank: wait until the save under way is committed.

        Raises:
            CheckpointError: the disk is full, or the trainer could not write.
        """
        together(self._processes, self.settle)

    def settle(self) -> None:
        """This rank's part of :meth:`wait`."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            if self._processes.rank > 0:
                pending.handle.wait()
                return
            if pending.commit is None:
                _commit(pending)
            else:
                pending.commit.result()
        except Exception as error:
            self._fail(pending.folder, error)
        checkpoint.prune(self._checkpoints, self._keep)
        self._committed(pending.folder)

    def _fail(self, folder: Path, error: Exception) -> NoReturn:
        if self._processes.rank == 0:
            checkpoint.discard(folder)
        if isinstance(error, CheckpointError | EndedElsewhereError):
            raise error
        raise checkpoint.save_failed(folder, error) from error

    def close(self) -> None:
        """End the thread; a save that is under way is left without a manifest."""
        self._thread.shutdown()


def _commit(pending: _Pending) -> None:
    pending.handle.wait()
    checkpoint.commit(pending.folder, pending.state)
