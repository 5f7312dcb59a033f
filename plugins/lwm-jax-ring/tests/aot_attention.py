"""Attention alone through the TPU compiler: prints, as JSON, what forward and backward send and run.

``python aot_attention.py TOPOLOGY STRATEGY SP KV_HEADS``: rows of 1,048,576 tokens, 32 query heads of 128, bfloat16,
dealt to SP devices each. A process of its own, since JAX starts once a process.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lwm_core.attention import AttentionMask
from lwm_core.protocols import AttentionAxes
from lwm_jax_ring.aot.compile import collectives, kernels, permutes
from lwm_jax_ring.aot.program_text import ProgramText
from lwm_jax_ring.aot.topology import topology_devices
from lwm_jax_ring.attention.backend import factory
from lwm_jax_ring.attention.options import AttentionOptions
from lwm_jax_ring.train.stage import make_mesh

SEQ_LEN, HEADS, HEAD_DIM = 1_048_576, 32, 128


def main(topology: str, strategy: str, sp: str, kv_heads: str) -> None:
    """Compile forward and backward over all devices, and print."""
    devices = topology_devices(topology)
    mesh = make_mesh({"dp": len(devices) // int(sp), "fsdp": 1, "tp": 1, "sp": int(sp)}, devices)
    backend = factory.build(AttentionOptions(strategy=strategy), mesh, AttentionAxes(), SEQ_LEN)

    def array(kind: str, *shape: int) -> jax.ShapeDtypeStruct:
        spec = P(("dp", "fsdp"), "sp", "tp", None)
        return jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(mesh, P(*spec[: len(shape)])))

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = backend.attend(q, k, v, AttentionMask("causal"), segments)
        return (out.astype(jnp.float32) ** 2).sum(), out

    rows = mesh.shape["dp"]
    q = array("bfloat16", rows, SEQ_LEN, HEADS, HEAD_DIM)
    k = array("bfloat16", rows, SEQ_LEN, int(kv_heads), HEAD_DIM)
    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    compiled = step.lower(q, k, k, array("int32", rows, SEQ_LEN)).compile()
    text = ProgramText(compiled.as_text())
    found: dict[str, Any] = {
        "devices": len(devices),
        "kernels": kernels(text),
        "permutes": [one._asdict() for one in permutes(text)],
        "collectives": [dataclasses.asdict(one) for one in collectives(text, mesh.shape)],
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
