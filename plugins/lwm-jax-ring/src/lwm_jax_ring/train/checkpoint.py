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
        CheckpointError: there is no such checkpoint, or it holds other arrays.
    """
    source = Path(folder).absolute() / STATE
    if not source.is_dir():
        raise CheckpointError(f"checkpoint {folder}: there is no {STATE!r} in it; it was not written by trainer 'jax'")
    _check_shapes(folder, _shapes(checkpointer.metadata(source).item_metadata.tree), _shapes(like))
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    return checkpointer.restore(source, target)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Path in the tree → shape. Containers are told by their keys alone, for orbax gives tuples back as dicts."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {
        ".".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path): tuple(leaf.shape)
        for path, leaf in leaves
    }


def _check_shapes(folder: Path, has: dict[str, tuple[int, ...]], needs: dict[str, tuple[int, ...]]) -> None:
    """Before anything is read: an array of another shape would only fail deep inside the reader."""
    for name in sorted(has.keys() | needs.keys()):
        if has.get(name) != needs.get(name):
            raise CheckpointError(
                f"checkpoint {folder}: {name} has shape {has.get(name, 'none: it is missing')}, the model needs "
                f"{needs.get(name, 'none: it has no such array')}; it belongs to another model"
            )
