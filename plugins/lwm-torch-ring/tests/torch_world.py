"""Four gloo processes as two rows of data by two of sequence: run as ``python torch_world.py RANK STORE``.

Each prints, as JSON, what its calls of torch.distributed were and how far its results are from one process's.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from lwm_core.attention import AttentionMask
from lwm_core.mesh import MESH_AXES
from lwm_core.protocols import AttentionAxes
from lwm_torch_ring.attention.backend import factory
from lwm_torch_ring.attention.options import AttentionOptions

WORLD, LENGTH, MASK = 4, 64, AttentionMask("causal")
CALLS: Counter[str] = Counter()


def counted(name: str) -> Any:
    """``torch.distributed``'s function of this name, every send written down."""
    plain = getattr(dist, name)

    def call(first: Any, *more: Any, **options: Any) -> Any:
        tensors = [op.tensor for op in first if op.op is dist.isend] if name == "batch_isend_irecv" else [first]
        CALLS.update(f"{name} {str(x.dtype).removeprefix('torch.')}" for x in tensors)
        return plain(first, *more, **options)

    return call


def results(backend: Any, arrays: list[torch.Tensor], segments: torch.Tensor) -> list[torch.Tensor]:
    """out, dq, dk, dv."""
    q, k, v, dout = (x.clone() for x in arrays)
    for x in (q, k, v):
        x.requires_grad_()
    out = backend.attend(q, k, v, MASK, segments)
    out.backward(dout)
    return [out.detach(), q.grad, k.grad, v.grad]


def main() -> None:
    rank, store = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    told: dict[str, Any] = {"rank": rank}
    torch.manual_seed(1)
    rows = [torch.randn(4, LENGTH, heads, 16) for heads in (4, 2, 2, 4)]
    ids = torch.randint(1, 4, (4, LENGTH), dtype=torch.int32).sort(dim=1).values
    for sizes, strategies in (((2, 1, 1, 2), ("ring", "allgather", "ulysses")), ((1, 1, 1, 4), ("usp",))):
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=MESH_AXES)
        (data, _, _, place), (dp, sp) = mesh.get_coordinate(), (sizes[0], sizes[3])
        for strategy in strategies:
            options = AttentionOptions(strategy=strategy, chunk=8)
            backend = factory.build(options, mesh, AttentionAxes(), LENGTH)
            mine = slice(data * 4 // dp, (data + 1) * 4 // dp)
            order = torch.from_numpy(backend.layout.permutation(LENGTH)).long().view(sp, -1)[place]
            alone = factory.build(AttentionOptions(), None, AttentionAxes(), LENGTH)
            expected = results(alone, [x[mine] for x in rows], ids[mine])
            got = results(backend, [x[mine][:, order] for x in rows], ids[mine][:, order])
            pairs = zip(got, expected, strict=True)
            told[strategy] = max(float((a - b[:, order]).norm() / b[:, order].norm()) for a, b in pairs)
    plain = {name: getattr(dist, name) for name in ("batch_isend_irecv", "all_to_all_single")}
    for name in plain:
        setattr(dist, name, counted(name))
    for strategy in ("ring", "ulysses"):
        CALLS.clear()
        backend = factory.build(AttentionOptions(strategy=strategy, layout="contiguous"), mesh, AttentionAxes(), LENGTH)
        part = slice(rank * LENGTH // WORLD, (rank + 1) * LENGTH // WORLD)
        arrays = [x[:, part].bfloat16().repeat_interleave(2 if x.shape[2] == 2 else 1, 2) for x in rows]
        results(backend, arrays, ids[:, part])
        told[f"{strategy} calls"] = dict(CALLS)
    print(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
