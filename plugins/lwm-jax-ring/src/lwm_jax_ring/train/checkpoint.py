"""Sharded, asynchronous checkpoints by orbax. A restore lays arrays out on the mesh of the current stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lwm_core.errors import CheckpointError

STATE = "state"


class OrbaxSave:
    """A save on its way to disk; orbax renames its folder when everything is written."""

    def __init__(self, checkpointer: ocp.StandardCheckpointer, folder: Path) -> None:
        self._checkpointer, self._folder = checkpointer, folder

    def done(self) -> bool:
        """Whether everything is on disk."""
        return self._folder.exists()

    def wait(self) -> None:
        """Wait until it is; raises what went wrong."""
        self._checkpointer.wait_until_finished()


def save(checkpointer: ocp.StandardCheckpointer, folder: Path, tree: Any) -> OrbaxSave:
    """Start writing ``tree``; the arrays are copied off the devices before this returns."""
    target = Path(folder).absolute() / STATE
    checkpointer.save(target, tree)
    return OrbaxSave(checkpointer, target)


def restore(checkpointer: ocp.StandardCheckpointer, folder: Path, like: Any) -> Any:
    """Read into the shapes, dtypes and shardings of ``like``.

    Raises:
        CheckpointError: the files do not hold such a tree.
    """
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    try:
        return checkpointer.restore(Path(folder).absolute() / STATE, target)
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"checkpoint {folder}: does not hold this model and optimizer: {reason}") from error
