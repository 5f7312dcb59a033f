"""The harness: arrays and errors travel both ways, workers are reused, and one that dies or hangs says so."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest

from lwm_core.attention import AttentionMask
from lwm_core.errors import PluginError, ShapeError, UnsupportedError
from lwm_core.reference import attention_forward
from lwm_core.testing import WorkerError, assert_close, attention_harness, close_workers
from lwm_core.testing import harness as harness_module

CAUSAL = AttentionMask("causal")


def arrays(seq_len: int = 8, dtype: object = np.float32):
    random = np.random.default_rng(0)
    return [random.standard_normal((1, seq_len, 2, 4)).astype(dtype) for _ in range(3)]  # type: ignore[call-overload]


def test_it_gives_the_backends_numbers(acme: str) -> None:
    q, k, v = arrays()
    with attention_harness(acme, world=2, layout="zigzag") as backend:
        out, lse = backend.forward(q, k, v, CAUSAL)
        dq, dk, dv = backend.backward(q, k, v, CAUSAL, np.ones_like(q), np.ones((1, 8), np.int32))
    expected_out, expected_lse = attention_forward(q, k, v, CAUSAL)
    assert_close(out, expected_out, 1e-5, "out")
    assert_close(lse, expected_lse, 1e-5, "lse")
    assert dq.shape == dk.shape == dv.shape == q.shape


def test_bfloat16_travels(acme: str) -> None:
    q, k, v = arrays(dtype=ml_dtypes.bfloat16)
    out, lse = attention_harness(acme).forward(q, k, v, CAUSAL)
    assert (out.dtype, lse.dtype) == (ml_dtypes.bfloat16, np.float32)
    assert_close(out, attention_forward(q, k, v, CAUSAL)[0], 1e-2, "out")


def test_one_worker_serves_every_table_of_options(acme: str) -> None:
    first = attention_harness(acme, world=2)
    second = attention_harness(acme, world=2, layout="striped")
    assert first._worker is second._worker
    assert attention_harness(acme, world=4)._worker is not first._worker


def test_the_worker_is_a_process_of_its_own(acme: str) -> None:
    worker = attention_harness(acme)._worker
    assert worker._process.pid != os.getpid()
    close_workers()
    assert not worker.alive
    assert attention_harness(acme)._worker.alive


@pytest.mark.parametrize(
    ("options", "told"), [({"layout": "nope"}, "layout"), ({"strategy": "usp"}, "strategy"), ({"nope": 1}, "nope")]
)
def test_refused_options_raise_not_implemented(acme: str, options: dict[str, object], told: str) -> None:
    with pytest.raises(NotImplementedError, match=told) as caught:
        attention_harness(acme, **options)
    assert isinstance(caught.value, UnsupportedError)
    assert "\n" not in str(caught.value)


def test_errors_keep_their_type(acme: str) -> None:
    backend = attention_harness(acme, world=2)
    with pytest.raises(ShapeError, match="not a multiple"):
        backend.forward(*arrays(seq_len=7), CAUSAL)
    with pytest.raises(UnsupportedError, match="float16"):
        backend.forward(*arrays(dtype=np.float16), CAUSAL)
    assert backend.forward(*arrays(), CAUSAL)[0].shape == (1, 8, 2, 4), "it goes on after an error"


def test_what_a_backend_should_not_raise_is_a_worker_error(acme: str) -> None:
    with pytest.raises(
        WorkerError, match=r"'acme-numpy' \(world 1\): RuntimeError: the kernel is out of order"
    ) as caught:
        attention_harness(acme, fault="raises").forward(*arrays(), CAUSAL)
    assert "Traceback" in caught.value.details


def test_a_dead_worker_gives_its_last_words_and_a_new_one_starts(acme: str) -> None:
    with pytest.raises(WorkerError, match="exit code 3 during 'forward': last words"):
        attention_harness(acme, fault="dies").forward(*arrays(), CAUSAL)
    assert attention_harness(acme).forward(*arrays(), CAUSAL)[0].shape == (1, 8, 2, 4)


def test_a_hanging_worker_is_ended(acme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = attention_harness(acme, fault="hangs")
    monkeypatch.setenv("LWM_TESTING_TIMEOUT", "0.5")
    start = time.monotonic()
    with pytest.raises(WorkerError, match=r"no answer to 'forward' in 0.5 s"):
        backend.forward(*arrays(), CAUSAL)
    assert time.monotonic() - start < 10
    assert not backend._worker.alive


def test_an_unknown_plugin_is_told_and_leaves_no_worker() -> None:
    before = dict(harness_module._workers)
    with pytest.raises(PluginError, match="no-such-plugin"):
        attention_harness("no-such-plugin")
    assert harness_module._workers == before


def test_a_world_must_be_positive() -> None:
    with pytest.raises(ShapeError, match="world is 0"):
        attention_harness("acme-numpy", world=0)


def test_workers_end_with_their_parent(acme: str, acme_site: os.PathLike[str]) -> None:
    code = (
        "from lwm_core.testing import attention_harness\n"
        "print(attention_harness('acme-numpy')._worker._process.pid, flush=True)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([os.fspath(acme_site), *filter(None, sys.path)])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env, timeout=60)
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


def test_the_harness_needs_no_pytest_and_no_framework() -> None:
    code = (
        "import sys; sys.modules['pytest'] = None\n"
        "from lwm_core.testing import attention_harness, assert_close\n"
        "print(sorted({'jax', 'torch', 'flax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
