"""Attention over whole pods by the real TPU compiler: a million tokens, forward and backward, what is sent and when."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

SEQ_LEN, HEADS, HEAD_DIM = 1_048_576, 32, 128
TOPOLOGIES = {"v4:8x8x4": 256, "v5p:8x8x8": 512, "v6e:16x16": 256, "tpu7x:4x4x4": 128}
FIRST = ("v5p:8x8x8", "tpu7x:4x4x4")
"""Those that every run of the tests compiles for: the most devices, and the one with transfers that nothing hides."""
EXPOSED = {"tpu7x:4x4x4": {"f32": 1, "bf16": 2}}
"""Of a ring: there the compiler runs the last dq kernel first and leaves one gradient, and both going home, alone."""
KERNELS = ("attention_block_forward", "attention_block_dq", "attention_block_dkv")

pytestmark = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu is not installed; pip install 'lwm-jax-ring[tpu]' brings it, no TPU is needed",
    ),
]


@cache
def compiled(topology: str, strategy: str, sp: int, kv_heads: int) -> dict[str, Any]:
    """What the compiler has made of it, from a process of its own."""
    script = Path(__file__).with_name("aot_attention.py")
    done = subprocess.run(
        [sys.executable, str(script), topology, strategy, str(sp), str(kv_heads)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == TOPOLOGIES[topology]
    return found


def check_ring(found: dict[str, Any], ranks: int, tokens: int, kv_heads: int) -> None:
    """A ring of ``ranks`` sends what it must and nothing else of that size, in its loops behind kernels.

    n−1 of K and V forward and again backward, in bfloat16; n−1 of float32 dK and dV, and one of what they come to.
    """
    assert found["kernels"] == dict.fromkeys(KERNELS, ranks)
    block = tokens * kv_heads * HEAD_DIM
    large = [one for one in found["permutes"] if one["bytes"] >= block]
    shape = f"[1,{tokens},{kv_heads},{HEAD_DIM}]"
    sent: Counter[str] = Counter()
    for one in large:
        sent[one["type"]] += one["count"]
    assert sent == {f"bf16{shape}": 2 * 2 * (ranks - 1) + 2, f"f32{shape}": 2 * (ranks - 1)}
    assert all(one["hidden"] for one in large if one["count"] > 1)


def exposed(found: dict[str, Any]) -> Counter[str]:
    """Large transfers that no kernel hides, by dtype."""
    counts: Counter[str] = Counter()
    for one in found["permutes"]:
        if one["bytes"] >= SEQ_LEN and not one["hidden"]:
            counts[one["type"].partition("[")[0]] += one["count"]
    return counts


@pytest.mark.parametrize(
    "topology", [pytest.param(name, marks=() if name in FIRST else pytest.mark.tpu_pods) for name in TOPOLOGIES]
)
def test_a_ring_over_a_pod(topology: str) -> None:
    ranks = TOPOLOGIES[topology]
    found = compiled(topology, "ring", ranks, HEADS)
    check_ring(found, ranks, SEQ_LEN // ranks, HEADS)
    assert exposed(found) == EXPOSED.get(topology, {})
    tokens = SEQ_LEN // ranks * HEADS * HEAD_DIM
    # q, out and dq, K and V in hand and on their way, float32 gradients three times over; no part of it is S long.
    assert found["temporary"] < 64 * tokens, found["temporary"] / tokens


@pytest.mark.tpu_pods
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_usp_over_a_pod(topology: str) -> None:
    """Neighbours exchange heads, and are one rank of the ring among the rest; grouped heads."""
    devices, kv_heads = TOPOLOGIES[topology], 8
    inner = {256: 16, 512: 16, 128: 8}[devices]
    ranks = devices // inner
    found = compiled(topology, "usp", devices, kv_heads)
    check_ring(found, ranks, SEQ_LEN // ranks, max(1, kv_heads // inner))
    assert exposed(found).total() <= 4  # at the end, out of the loops
    kinds = {one["kind"] for one in found["collectives"]}
    assert kinds == {"collective-permute", "all-to-all", "all-gather"}
    assert sum(one["count"] for one in found["collectives"] if one["kind"] == "all-to-all") == 8


@pytest.mark.tpu_pods
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_ulysses_over_as_many_devices_as_heads(topology: str) -> None:
    """Each device has a head of the whole row: one kernel a pass, eight exchanges, no permute."""
    found = compiled(topology, "ulysses", HEADS, HEADS)
    assert found["kernels"] == dict.fromkeys(KERNELS, 1) and not found["permutes"]
    assert sum(one["count"] for one in found["collectives"] if one["kind"] == "all-to-all") == 8
