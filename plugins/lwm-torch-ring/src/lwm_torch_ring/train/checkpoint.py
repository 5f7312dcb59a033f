"""Sharded, asynchronous checkpoints by torch's DCP in safetensors: no pickle is written, and none is read.

Every rank writes what it holds; a restore reads into whatever shards there are.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor

from lwm_core.errors import CheckpointError

STATE = "state"


class DcpSave:
    """A save on its way to disk. Rank 0's is through when every rank's files are there."""

    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def done(self) -> bool:
        """Whether everything is on disk, or writing it has failed."""
        return self._future.done()

    def wait(self) -> None:
        """Wait until it is; raises what went wrong."""
        self._future.result()


class Checkpointer:
    """Saves and restores named tensors; it talks over a group of its own, beside the training's."""

    def __init__(self, timeout: float) -> None:
        patience = timedelta(seconds=timeout)
        self._group = dist.new_group(backend="gloo", timeout=patience) if dist.is_initialized() else None
        # Said in a thread of DCP's own, of what is meant: one process saves alone.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)

    def save(self, folder: Path, state: Mapping[str, Tensor]) -> DcpSave:
        """Start writing; the tensors are copied before this returns. All ranks call it at the same time."""
        target = Path(folder).absolute() / STATE
        # One thread would overlap copies on the first GPU of the host, whichever is this rank's.
        writer = dcp.HuggingFaceStorageWriter(str(target), save_distributed=True, thread_count=2)
        future = dcp.async_save(
            dict(state), storage_writer=writer, process_group=self._group, no_dist=self._group is None
        )
        return DcpSave(future)  # type: ignore[arg-type]

    def restore(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Read into the tensors of ``state``. All ranks call it at the same time.

        Raises:
            CheckpointError: there is no such checkpoint, or it holds other arrays.
        """
        source = Path(folder).absolute() / STATE
        if not source.is_dir():
            raise CheckpointError(
                f"checkpoint {folder}: there is no {STATE!r} in it; it was not written by trainer 'torch'"
            )
        reader = dcp.HuggingFaceStorageReader(str(source))
        try:
            found = reader.read_metadata().state_dict_metadata
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"checkpoint {folder}: cannot be read: {error}") from error
        has = {name: tuple(one.size) for name, one in found.items()}  # type: ignore[union-attr]
        needs = {name: tuple(tensor.shape) for name, tensor in state.items()}
        for name in sorted(has.keys() | needs.keys()):
            if has.get(name) != needs.get(name):
                raise CheckpointError(
                    f"checkpoint {folder}: {name} has shape {has.get(name, 'none: it is missing')}, the model needs "
                    f"{needs.get(name, 'none: it has no such array')}; it belongs to another model"
                )
        dcp.load(dict(state), storage_reader=reader, process_group=self._group, no_dist=self._group is None)
