"""``lwm aot`` with the trainer ``jax``: real steps through the real TPU compiler, and every way not to get there."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lwm_core.errors import UnsupportedError, UsageError
from lwm_jax_ring.aot import topology
from lwm_jax_ring.aot.compile import out_of_memory

LAYERS = 32

SMALL = """
extends = ["lwm-text"]
name = "small"
model = { preset = "tiny" }

[[stages]]
name = "8K"
seq_len = 8192
theta = 1e6
tokens = 8192
batch_tokens = 8192
lr = 4e-5
mesh = "1,1,1,4"
"""

libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed; pip install 'lwm-jax-ring[tpu]' brings it, no TPU is needed",
)


def lwm_aot(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with whatever devices JAX would take."""
    command = [sys.executable, "-c", "import sys; from lwm_core.cli import main; sys.exit(main())", "aot", *words]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | {"JAX_PLATFORMS": ""}, capture_output=True, text=True, timeout=900
    )


@pytest.fixture
def small(tmp_path: Path) -> Path:
    (tmp_path / "small.toml").write_text(SMALL)
    return tmp_path


@libtpu
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--topology", "v5p"), "cannot be read; expected a chip and its torus"),
        (("--topology", "v99:2x2x1"), "'v99:2x2x1' is refused by the TPU compiler"),
        (("--topology", "v5p:2x2x2"), "mesh '1,1,1,4' needs 4 devices, but 8 are here"),
        (("--topology", "v5p:2x2x1", "--stage", "1M"), "--stage 1M: there is no such stage; expected one of 8K"),
    ],
)
def test_wrong_use_is_one_line(small: Path, words: tuple[str, ...], told: str) -> None:
    done = lwm_aot("small.toml", *words, cwd=small)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and told in errors[0], done.stderr
    assert "Traceback" not in done.stderr


def test_without_the_compiler_it_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'lwm-jax-ring\[tpu\]'"):
        topology.topology_devices("v5p:2x2x1")
    with pytest.raises(UsageError, match="cannot be read"):
        topology.topology_devices("v5p:2x")


def test_the_compilers_words_are_kept() -> None:
    assert out_of_memory("RESOURCE_EXHAUSTED: much\n\n  largest: 1\n \n") == "RESOURCE_EXHAUSTED: much\n  largest: 1"


@libtpu
@pytest.mark.tpu_aot
def test_a_small_step_is_told_as_json(small: Path) -> None:
    done = lwm_aot("small.toml", "--topology", "v5p:2x2x1", "--json", cwd=small)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    assert (found["stage"], found["rows"], found["devices"], found["device_kind"]) == ("8K", 1, 4, "TPU v5")
    assert found["limit_bytes"] == int(95.74 * 2**30)
    kinds = {one["kind"] for one in found["collectives"]}
    assert "collective-permute" in kinds and found["kernels"]["attention_block_forward"] > 0


@libtpu
@pytest.mark.tpu_aot
def test_what_does_not_fit_is_told_in_the_compilers_words(small: Path) -> None:
    """Twelve bytes a parameter of one huge layer on four devices of 15.75 GiB."""
    huge = {"hidden_size": 8192, "intermediate_size": 262_144, "num_layers": 1, "num_heads": 64, "num_kv_heads": 64}
    words = [word for key, value in huge.items() for word in ("-s", f"model.{key}={value}")]
    done = lwm_aot("small.toml", "--topology", "v5e:2x2", *words, cwd=small)
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("8K: 1 rows of 8192 tokens, mesh 1,1,1,4\n")
    assert "  does not fit" in done.stdout and "RESOURCE_EXHAUSTED" in done.stdout and "15.75G" in done.stdout
    assert "2.00 GiB layers.mlp.up_proj.kernel float32[1, 2048, 262144]" in done.stdout
    # The weights of a layer whole, as they are gathered to compute with.
    values = done.stdout.partition("largest values of the traced program")[2]
    assert "8.00 GiB float32[8192, 262144] by sharding_constraint" in values, done.stdout
    assert "4.00 GiB bfloat16[8192, 262144]" in values
    assert "Traceback" not in done.stderr


@libtpu
@pytest.mark.tpu_aot
def test_a_million_tokens_train_on_the_papers_machine() -> None:
    """LWM-7B, 4 rows of 1,048,576 tokens, TPU v4-512: fits, and the ring is not run again for the backward pass."""
    done = lwm_aot("lwm-text", "--topology", "v4:8x8x4", "--stage", "1M", "--json")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    assert (found["seq_len"], found["rows"], found["devices"]) == (1_048_576, 4, 256)
    assert found["bytes"] < 16e9 < found["limit_bytes"]
    ranks = 4
    assert found["kernels"]["attention_block_forward"] == LAYERS * ranks
    assert found["kernels"]["attention_block_dkv"] == LAYERS * ranks
