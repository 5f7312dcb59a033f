"""The Pallas TPU kernels through the real TPU compiler, for real topologies, on a machine without a TPU.

Shapes: B batch, C queries, T keys, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lwm_jax_ring.attention.blocks import Keys, Queries
from lwm_jax_ring.attention.kernels import pallas_tpu

TOPOLOGIES: dict[str, dict[str, str]] = {
    "v4": {"topology_name": "v4:2x2x1", "chip_config_name": "megacore"},
    "v5p": {"topology_name": "v5p:2x2x1"},
    "v6e": {"topology_name": "v6e:2x2"},
    "tpu7x": {"topology_name": "tpu7x:2x2x1"},
}
CASES: dict[str, dict[str, Any]] = {
    "7b": {"dtype": "bfloat16", "tokens": 8192, "keys": 8192, "heads": 32, "kv_heads": 32, "dim": 128},
    "grouped-documents": {
        "dtype": "bfloat16", "tokens": 2048, "keys": 4096, "heads": 32, "kv_heads": 8, "dim": 128, "documents": True,
    },
    "float32-ragged-softcap": {
        "dtype": "float32", "tokens": 1000, "keys": 600, "heads": 4, "kv_heads": 2, "dim": 64, "softcap": 30.0,
    },
}  # fmt: skip


def compile_for_tpu(
    sharding: Any,
    dtype: str,
    tokens: int,
    keys: int,
    heads: int,
    kv_heads: int,
    dim: int,
    documents: bool = False,
    softcap: float | None = None,
) -> dict[str, Any]:
    """Compile forward and backward of one hop: names of the kernels in the programs, bytes needed beside the arrays."""

    def array(*shape: int, dtype: str = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def ids(*shape: int) -> jax.ShapeDtypeStruct:
        return array(*shape, dtype="int32")

    queries = Queries(ids(1, tokens), ids(1, tokens), ids(2, tokens) if documents else None)
    masks = queries, Keys(ids(keys), ids(2, keys) if documents else None)
    q, k = array(2, tokens, heads, dim), array(2, keys, kv_heads, dim)
    stat = array(2, tokens, heads, dtype="float32")
    options = {"scale": dim**-0.5, "softcap": softcap}
    programs = [
        jax.jit(partial(pallas_tpu.forward, **options)).lower(q, k, k, *masks).compile(),
        jax.jit(partial(pallas_tpu.backward, **options)).lower(q, k, k, q, q, stat, *masks).compile(),
    ]
    text = "".join(program.as_text() for program in programs)
    return {
        "kernels": sorted(set(re.findall(r"%?(attention_block_[a-z]+)", text))),
        "temporary": max(program.memory_analysis().temp_size_in_bytes for program in programs),
    }


def compile_all(target: str) -> None:
    """Compile all cases for one topology, in a process of its own; prints one JSON object."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", **TOPOLOGIES[target]).devices
    sharding = NamedSharding(Mesh(np.array(devices[:1]), ("one",)), PartitionSpec())
    print(json.dumps({name: compile_for_tpu(sharding, **case) for name, case in CASES.items()}))


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    "target", [name if name == "v5p" else pytest.param(name, marks=pytest.mark.tpu_pods) for name in TOPOLOGIES]
)
def test_real_tpus_compiler_takes_the_kernels(target: str) -> None:
    """All three kernels of each case are in the programs; what they need beside the arrays grows with the length."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed; pip install 'lwm-jax-ring[tpu]' brings it, no TPU is needed")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    command = [sys.executable, __file__, target]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    for name, found in json.loads(done.stdout.splitlines()[-1]).items():
        case = CASES[name]
        assert found["kernels"] == ["attention_block_dkv", "attention_block_dq", "attention_block_forward"], name
        rows = 2 * 4 * case["heads"] * (case["tokens"] + case["keys"]) * 128  # bytes of float32 queries and keys
        assert found["temporary"] < 8 * rows, f"{name}: {found['temporary']} bytes beside the arrays"


if __name__ == "__main__":
    compile_all(sys.argv[1])
