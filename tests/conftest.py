"""Fixtures that plant real distributions and run the real command on them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# No deadline: a shared machine may stall for longer than any example should take, and that is no failure.
settings.register_profile("lwm", deadline=None)
settings.load_profile("lwm")

STANDIN = Path(__file__).parent / "standin"

STANDIN_POINTS = {
    "lwm.trainer.v1": {"standin": "lwm_standin._lwm:trainer", "framed": "lwm_standin._lwm:framed"},
    "lwm.attention.v1": {"standin": "lwm_standin._lwm:attention", "foreign": "lwm_standin._lwm:foreign"},
    "lwm.encoder.v1": {"patches": "lwm_standin._lwm:encoder", "torch-patches": "lwm_standin._lwm:torch_encoder"},
    "lwm.eval.v1": {"tally": "lwm_standin._lwm:evals", "glance": "lwm_standin._lwm:glance"},
    "lwm.data.v1": {"coded": "lwm_standin._lwm:coded"},
    "lwm.hooks.v1": {"scribe": "lwm_standin._lwm:hooks"},
    "lwm.context.v1": {"doubling": "lwm_standin._lwm:schedule"},
    "lwm.weights.v1": {"standin-base": "lwm_standin._lwm:weights"},
    "lwm.cli.v1": {"greet": "lwm_standin._lwm:verb"},
}


def plant(site: Path, dist: str, points: Mapping[str, Mapping[str, str]], version: str = "0.1.0") -> None:
    """Write the metadata of an installed distribution into ``site``."""
    folder = site / f"{dist.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
    groups = (f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in rows.items()) for group, rows in points.items())
    (folder / "entry_points.txt").write_text("\n".join(groups))


@pytest.fixture(scope="session")
def planted() -> Callable[..., None]:
    """:func:`plant`, for tests that plant more."""
    return plant


@pytest.fixture(scope="session")
def standin_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for ``sys.path`` with the distribution ``lwm-standin`` in it."""
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(STANDIN / "lwm_standin", site / "lwm_standin", ignore=shutil.ignore_patterns("__pycache__"))
    plant(site, "lwm-standin", STANDIN_POINTS)
    return site


@pytest.fixture
def standin_env(standin_site: Path, tmp_path: Path) -> dict[str, str]:
    """An environment in which ``lwm-standin`` is the only plugin beside the core's."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("LWM_")}
    return {
        **kept, "PYTHONPATH": str(standin_site), "LWM_PLUGINS": "lwm-standin", "COLUMNS": "100",
        "OPENBLAS_NUM_THREADS": "1",
    }  # fmt: skip


@pytest.fixture
def standin_here(standin_site: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``lwm-standin`` as the only plugin of this very process."""
    from lwm_core import registry

    monkeypatch.syspath_prepend(str(standin_site))
    monkeypatch.setenv("LWM_PLUGINS", "lwm-standin")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    registry.refresh()
    yield
    registry.refresh()


class Command:
    """The ``lwm`` command in a folder and an environment of its own."""

    def __init__(self, cwd: Path, env: Mapping[str, str]) -> None:
        self.cwd = cwd
        self.env = dict(env)

    def arguments(self, *words: str) -> list[str]:
        """What a process is started with."""
        return [sys.executable, "-c", "import sys; from lwm_core.cli import main; sys.exit(main())", *words]

    def __call__(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run to the end."""
        return subprocess.run(
            self.arguments(*words), cwd=self.cwd, env={**self.env, **env}, capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip

    def start(self, *words: str, **env: str) -> subprocess.Popen[str]:
        """Start, for tests that end it."""
        return subprocess.Popen(
            self.arguments(*words), cwd=self.cwd, env={**self.env, **env}, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip


@pytest.fixture
def lwm(tmp_path: Path, standin_env: dict[str, str]) -> Command:
    """The command, with the stand-in plugins, in ``tmp_path``."""
    return Command(tmp_path, standin_env)


SMALL = """
name = "small"
seed = 3
model = {{ preset = "tiny", hidden_size = 8, intermediate_size = 16, num_layers = 1, num_heads = 2, num_kv_heads = 1 }}
trainer = {{ name = "standin"{trainer} }}
attention = {{ name = "standin" }}
data = {{ name = "text-file", path = "shipped:genesis" }}
evals = [{evals}]

[[stages]]
name = "short"
seq_len = 32
tokens = {tokens}
batch_tokens = 64
lr = 2.0
warmup_steps = 3

[[stages]]
name = "long"
seq_len = 64
theta = 40_000.0
tokens = {tokens}
batch_tokens = 128
lr = 1.0
lr_schedule = "cosine"

[samples]
prompts = ["And God "]
max_new_tokens = 8

[run]
log_every = 5
checkpoint_every = {every}
keep_checkpoints = 3
{more}
"""


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., Path]:
    """Writes ``small.toml``: two stages of the stand-in trainer over the shipped text."""

    def write(trainer: str = "", evals: str = "", tokens: int = 640, every: int = 4, more: str = "") -> Path:
        path = tmp_path / "small.toml"
        path.write_text(
            SMALL.format(trainer=f", {trainer}" if trainer else "", evals=evals, tokens=tokens, every=every, more=more)
        )
        return path

    return write


TIMING = ("time", "step_seconds", "tokens_per_second", "mfu")


@pytest.fixture(scope="session")
def exact_rows() -> Callable[[Path], list[dict[str, Any]]]:
    """The rows of a run's metrics without what is measured by a clock; each line must be whole."""

    def read(run: Path) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]

    return read
