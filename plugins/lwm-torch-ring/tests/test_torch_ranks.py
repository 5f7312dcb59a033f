"""Rank processes that die, hang or fail alone: one error that names the rank, soon, and a fresh start after it."""

from __future__ import annotations

import signal
import subprocess
import time
from typing import Any

import numpy as np
import pytest

from lwm_core.attention import AttentionMask
from lwm_core.errors import ShapeError
from lwm_torch_ring.attention.harness import TorchRingHarness
from lwm_torch_ring.attention.options import AttentionOptions
from lwm_torch_ring.attention.ranks import GRACE, RankError, RankPool, close_pools, rank_pool

CAUSAL = AttentionMask("causal")


def normal(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.mark.slow
def test_a_rank_that_dies_is_one_error_that_names_it() -> None:
    """The others do not hang, and the next call starts afresh."""
    harness = TorchRingHarness(AttentionOptions(), 3)
    q, k, v = (normal(n, 1, 96, 2, 8) for n in range(3))
    try:
        expected, _ = harness.forward(q, k, v, CAUSAL)
        pool = rank_pool(3)
        pool.processes[1].send_signal(signal.SIGSTOP)  # so that it is in the middle of a call when it dies
        killer = subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {pool.processes[1].pid}"])
        start = time.monotonic()
        with pytest.raises(RankError, match=r"rank 1 of 3 ended with exit code -9 during 'forward'"):
            harness.forward(q, k, v, CAUSAL)
        assert time.monotonic() - start < 1 + GRACE + 20
        killer.wait()
        assert all(process.poll() is not None for process in pool.processes)
        np.testing.assert_array_equal(harness.forward(q, k, v, CAUSAL)[0], expected)
    finally:
        close_pools()


@pytest.mark.slow
def test_a_rank_that_hangs_is_named() -> None:
    pool = RankPool(2, seconds=40.0)
    ask = {"do": "forward", "options": AttentionOptions().model_dump_json(), "mask": {"kind": "causal"}, "seq_len": 32}
    shards = [{name: np.ones((1, 16, 2, 8), np.float32) for name in "qkv"} for _ in range(2)]
    try:
        assert len(pool.ask(ask, shards)) == 2
        pool._seconds = 2.0
        pool.processes[0].send_signal(signal.SIGSTOP)
        with pytest.raises(RankError, match=r"rank 0 of 2 gave no answer to 'forward' in 2 s"):
            pool.ask(ask, shards)
        assert not pool.alive
    finally:
        pool.close()


@pytest.mark.slow
def test_a_rank_that_fails_alone_is_told_before_those_that_miss_it() -> None:
    """One rank raises before its transfer; what it brings on the other is not what the caller reads."""
    pool = RankPool(2, seconds=40.0)
    ask = {"do": "forward", "options": AttentionOptions().model_dump_json(), "mask": {"kind": "causal"}, "seq_len": 32}
    shards = [{name: np.ones((1, size, 2, 8), np.float32) for name in "qkv"} for size in (16, 8)]
    try:
        with pytest.raises(ShapeError, match="built for 16 tokens a process, got 8"):
            pool.ask(ask, shards)
        assert not pool.alive
    finally:
        pool.close()
