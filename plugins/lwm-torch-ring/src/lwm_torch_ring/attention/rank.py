"""One rank of the conformance kit's harness: ``python -m lwm_torch_ring.attention.rank RANK WORLD STORE SECONDS``.

It joins the others over gloo and answers one request at a time, shards in and shards out, until its input ends.

Shapes: B batch, C tokens of a process, H query heads, K key-value heads, D head dim; tokens in the layout's order.
"""

from __future__ import annotations

import os
import socket
import sys
from datetime import timedelta
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from lwm_core.attention import AttentionMask
from lwm_core.attention_cost import AttentionShape
from lwm_core.mesh import MESH_AXES
from lwm_core.protocols import AttentionAxes
from lwm_core.testing import wire
from lwm_core.testing.worker import describe
from lwm_torch_ring.attention.backend import TorchRing, factory
from lwm_torch_ring.attention.options import AttentionOptions

AXES = AttentionAxes()


def to_torch(array: NDArray[Any]) -> Tensor:
    """A tensor of its own; bfloat16 by its bits."""
    array = np.array(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: Tensor) -> NDArray[Any]:
    """The inverse of :func:`to_torch`."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


class RankDesk:
    """One rank; keeps a backend for each table of options and length that was asked for."""

    def __init__(self, world: int) -> None:
        self._mesh = init_device_mesh("cpu", (1, 1, 1, world), mesh_dim_names=MESH_AXES)
        self._backends: dict[str, TorchRing] = {}

    def _backend(self, table: str, seq_len: int) -> TorchRing:
        key = f"{table} {seq_len}"
        if key not in self._backends:
            options = AttentionOptions.model_validate_json(table)
            self._backends[key] = factory.build(options, self._mesh, AXES, seq_len)
        return self._backends[key]

    def answer(self, header: wire.Header, arrays: wire.Arrays) -> tuple[wire.Header, wire.Arrays]:
        """Do what a request asks and return the reply."""
        if header["do"] == "resolve":
            options = AttentionOptions.model_validate_json(header["options"])
            shape = AttentionShape(**header["shape"], mask=AttentionMask(**header["mask"]))
            choice = factory.resolve(options, shape, self._mesh, AXES)
            return {"options": choice.options.model_dump_json()}, {}
        return {}, self._attend(header, arrays)

    def _attend(self, header: wire.Header, arrays: wire.Arrays) -> wire.Arrays:
        mask = AttentionMask(**header["mask"])
        given = {name: to_torch(array) for name, array in arrays.items()}
        q, k, v, segments = given["q"], given["k"], given["v"], given.get("segment_ids")
        backend = self._backend(header["options"], header["seq_len"])
        if header["do"] == "forward":
            with torch.no_grad():
                out, lse = backend.forward(q, k, v, mask, segments)
            return {"out": to_numpy(out), "lse": to_numpy(lse)}
        for x in (q, k, v):
            x.requires_grad_()
        backend.attend(q, k, v, mask, segments).backward(given["dout"])
        return {f"d{name}": to_numpy(x.grad) for name, x in (("q", q), ("k", k), ("v", v)) if x.grad is not None}


def serve(source: BinaryIO, sink: BinaryIO, desk: RankDesk) -> None:
    """Answer requests until ``source`` ends."""
    while (message := wire.receive(source)) is not None:
        try:
            reply = desk.answer(*message)
        except Exception as error:  # whatever happens is told to the harness, which raises it there
            wire.send(sink, {"error": describe(error)})
        else:
            wire.send(sink, *reply)


def main() -> None:
    """Serve as a rank on the standard streams."""
    rank, world, store, seconds = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what torch prints must not meet the messages
    torch.set_num_threads(1)
    if "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo looks this host's name up, which may be unknown
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=seconds)
    )
    serve(source, sink, RankDesk(world))
    # No goodbye: the others leave by themselves, and one that waits for a rank that is gone would never do so.
    os._exit(0)


if __name__ == "__main__":
    main()
