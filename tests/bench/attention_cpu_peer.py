"""The worker for PyPI's ``ringattention`` 0.1.2, in its own environment: contiguous shards, chunks as asked for.

It is called in its fastest exact form for this case: no bias, no segment ids, no dropout, blocks above the diagonal
skipped by ``causal_block_size=1``, and ``prevent_cse=False``, which is what its scans allow.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

# Read when JAX starts, which importing ringattention does.
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={json.loads(sys.argv[1])['world']}"

import jax
import jax.numpy as jnp
import numpy as np
from bench_worker import Attend, Chunks, Subject, serve
from jax.experimental.shard_map import shard_map
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ringattention import ringattention


def make(case: dict[str, Any]) -> Subject:
    """``ringattention`` over ``world`` host devices; tokens in natural order, which is the only one it knows."""
    world, local = case["world"], case["seq_len"] // case["world"]
    mesh = Mesh(np.array(jax.devices()[:world]).reshape(1, 1, 1, world), ("dp", "fsdp", "tp", "sp"))

    def attend(chunks: Chunks) -> Attend:
        if local % chunks[0] or local % chunks[1]:
            # Its reshape would raise, or its mask be off where only one of the two divides.
            raise ValueError(f"ringattention: chunks {chunks[0]}x{chunks[1]} do not divide {local} tokens a device")
        settings = {
            "causal_block_size": 1,
            "query_chunk_size": chunks[0],
            "key_chunk_size": chunks[1],
            "deterministic": True,
            "dropout_rng": None,
            "attn_pdrop": 0.0,
            "dtype": jnp.float32,
            "policy": jax.checkpoint_policies.nothing_saveable,
            "precision": None,
            "prevent_cse": False,
        }

        def one_rank(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return ringattention(q, k, v, None, None, None, "sp", True, settings)

        spec = P(None, "sp")
        return shard_map(one_rank, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_rep=False)

    return Subject(mesh=mesh, attend=attend, chunks=None, packages=("ringattention", "jax", "jaxlib", "flax", "numpy"))


if __name__ == "__main__":
    serve(make)
