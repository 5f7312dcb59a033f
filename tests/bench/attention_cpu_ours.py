"""The worker for this repository's ``jax-ring``: the registry's factory, zigzag, the plugin's default chunks."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from bench_worker import Attend, Chunks, Subject, serve
from jax.sharding import Mesh

from lwm_core.attention import AttentionMask
from lwm_core.protocols import AttentionAxes
from lwm_core.registry import Registry, validate_options
from lwm_jax_ring.devices import ensure_devices


def make(case: dict[str, Any]) -> Subject:
    """``jax-ring`` over ``world`` host devices; tokens in zigzag order, as the trainer's feed deals them."""
    seq_len, world = case["seq_len"], case["world"]
    ensure_devices(world)
    mesh = Mesh(np.array(jax.devices()[:world]).reshape(1, 1, 1, world), ("dp", "fsdp", "tp", "sp"))
    registry = Registry.from_environment()
    factory: Any = registry.load("attention", "jax-ring")
    defaults: Any = validate_options(registry, "attention", "jax-ring", {"layout": "zigzag"})

    def attend(chunks: Chunks) -> Attend:
        options = defaults.model_copy(update={"query_chunk": chunks[0], "key_chunk": chunks[1]})
        backend = factory.build(options, mesh, AttentionAxes(), seq_len)
        return lambda q, k, v: backend.attend(q, k, v, AttentionMask("causal"))

    return Subject(
        mesh=mesh,
        attend=attend,
        chunks=(defaults.query_chunk, defaults.key_chunk),
        packages=("lwm-core", "lwm-jax-ring", "jax", "jaxlib", "numpy"),
        order=factory.layout(defaults, seq_len, world).permutation(seq_len),
    )


if __name__ == "__main__":
    serve(make)
