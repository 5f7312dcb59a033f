"""Checkpoints that go to disk while training goes on: started after a step, committed once everything is there."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lwm_core import checkpoint
from lwm_core.checkpoint import RunState
from lwm_core.errors import CheckpointError
from lwm_core.protocols import SaveHandle, Trainer


@dataclass
class _Pending:
    folder: Path
    state: RunState
    handle: SaveHandle
    commit: Future[None] | None = None


class Saver:
    """Saves one checkpoint at a time and keeps the newest ``keep``.

    Args:
        checkpoints: the folder they lie in.
        keep: how many to keep.
        committed: told the path of each when it is complete, in the thread that calls the saver.
    """

    def __init__(self, checkpoints: Path, keep: int, committed: Callable[[Path], None]) -> None:
        self._checkpoints = checkpoints
        self._keep = keep
        self._committed = committed
        self._pending: _Pending | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lwm-save")

    def save(self, trainer: Trainer, state: RunState) -> None:
        """Start a save; an earlier one is waited for first.

        Raises:
            CheckpointError: the disk is full, or the trainer cannot write.
        """
        self.wait()
        folder = checkpoint.checkpoint_folder(self._checkpoints, state.step)
        try:
            handle = trainer.save(checkpoint.prepare(folder))
        except Exception as error:
            raise _failed(folder, error) from error
        self._pending = _Pending(folder, state, handle)

    def poll(self) -> None:
        """Commit what has reached the disk, without waiting: checksums are taken in a thread."""
        pending = self._pending
        if pending is None:
            return
        if pending.commit is None:
            if pending.handle.done():
                pending.commit = self._thread.submit(_commit, pending)
        elif pending.commit.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the save under way is committed.

        Raises:
            CheckpointError: the disk is full, or the trainer could not write.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            if pending.commit is None:
                _commit(pending)
            else:
                pending.commit.result()
        except Exception as error:
            raise _failed(pending.folder, error) from error
        checkpoint.prune(self._checkpoints, self._keep)
        self._committed(pending.folder)

    def close(self) -> None:
        """End the thread; a save that is under way is left without a manifest."""
        self._thread.shutdown()


def _commit(pending: _Pending) -> None:
    pending.handle.wait()
    checkpoint.commit(pending.folder, pending.state)


def _failed(folder: Path, error: Exception) -> CheckpointError:
    return error if isinstance(error, CheckpointError) else checkpoint.save_failed(folder, error)
