"""The worker for this repository's ``torch-ring``: the registry's factory, strategy ring, zigzag, one of the ranks."""

from __future__ import annotations

from typing import Any

from bench_torch_worker import Program, Subject, serve
from torch.distributed.device_mesh import init_device_mesh

from lwm_core.attention import AttentionMask
from lwm_core.mesh import MESH_AXES
from lwm_core.protocols import AttentionAxes
from lwm_core.registry import Registry, validate_options


def make(case: dict[str, Any]) -> Subject:
    """``torch-ring`` over ``world`` gloo processes; tokens in zigzag order, as a trainer's feed deals them."""
    world, rank = case["world"], case["rank"]
    mesh = init_device_mesh("cpu", (1, 1, 1, world), mesh_dim_names=MESH_AXES)
    registry = Registry.from_environment()
    factory: Any = registry.load("attention", "torch-ring")
    options: Any = validate_options(registry, "attention", "torch-ring", {"strategy": "ring", "layout": "zigzag"})
    mask = AttentionMask("causal")

    def program(seq_len: int, how: Any) -> Program:
        backend = factory.build(options, mesh, AttentionAxes(), seq_len)
        places = factory.layout(options, seq_len, world).rank_indices(seq_len, rank)
        return Program(lambda q, k, v: backend.attend(q, k, v, mask), places)

    about = {"kernel": options.kernel, "layout": options.layout}
    return Subject(program, ("lwm-core", "lwm-torch-ring", "numpy"), about)


if __name__ == "__main__":
    serve(make)
