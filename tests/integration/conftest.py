"""Real processes of the Torch trainer, as a launcher starts them, and a feed that writes down what it gives."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for vision_ring

EXTEND = """
name = "extend"
seed = 5
model = { preset = "debug", hidden_size = 32, intermediate_size = 64, num_layers = 2 }
tokenizer = { name = "bytes" }
trainer = { name = "torch", device = "cpu" }
attention = { name = "torch-ring", layout = "zigzag" }
evals = [{ name = "needle", samples = 2, samples_longest = 2, lengths = [512], max_new_tokens = 6 }]

[data]
name = "noted"
sources.text = { kind = "text", corpus = "kjv" }
sources.needle = { kind = "needle", haystack = "text" }
weights = { text = 1.0 }

[context]
name = "progressive"
from = 128
lengths = [256, 512]
theta = [20_000.0, 80_000.0]
tokens = [24_576, 24_576]
batch_tokens = 2048
lr = 1e-3
mesh = ["1,1,1,-1", "1,-1,1,1"]
mix = [{ text = 1.0 }, { text = 0.5, needle = 0.5 }]

[samples]
prompts = ["And God said"]
max_new_tokens = 4

[run]
checkpoint_every = 5
"""
"""Twelve steps with the sequence shared out, then twelve with the rows shared out."""

NOTED = """
import hashlib, json, os
from dataclasses import fields
from pathlib import Path
from lwm_core.registry import PluginSpec

spec = PluginSpec(
    name="noted", summary="mix, written down", factory="noted_feed:open_noted", options="lwm_data.options:MixOptions"
)

def open_noted(options, context):
    from lwm_data.feed import open_mix
    return Source(open_mix(options, context))

class Source:
    def __init__(self, mix):
        self.mix = mix
    def open(self, request):
        return Feed(self.mix.open(request), request)
    def held_out(self):
        return self.mix.held_out()

class Feed:
    def __init__(self, feed, request):
        self.feed, self.request = feed, request
    def batch(self, step):
        batch, of = self.feed.batch(step), self.request
        arrays = [getattr(batch, field.name) for field in fields(batch)]
        for row in range(len(arrays[0])):
            digest = hashlib.sha256(b"".join(array[row].tobytes() for array in arrays)).hexdigest()
            place = of.rank * of.rows // of.world + row
            self.note(stage=of.stage_index, step=step, row=place, digest=digest, ranks=of.world)
        return batch
    def note(self, **facts):
        if "NOTED" in os.environ:
            with open(Path(os.environ["NOTED"]) / f"{os.environ.get('RANK', 0)}-{os.getpid()}.jsonl", "a") as file:
                file.write(json.dumps(facts) + "\\n")
    def close(self):
        self.feed.close()
"""
"""The data plugin ``noted``: what ``mix`` feeds, with a digest of every row in a file ``RANK-PID.jsonl``."""


def _places(world: int) -> list[dict[str, str]]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    return [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
         "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for rank in range(world)
    ]  # fmt: skip


@pytest.fixture(scope="session")
def places() -> Callable[[int], list[dict[str, str]]]:
    """The environment of each of so many processes of Torch, as torchrun tells them their places."""
    return _places


class Ranks:
    """The ``lwm`` command with every installed plugin, and the recipe ``extend.toml`` beside it."""

    def __init__(self, lwm: Any) -> None:
        self.lwm, self.folder, self.env = lwm, lwm.cwd, lwm.env

    def start(self, world: int, *words: str, **env: str) -> list[subprocess.Popen[str]]:
        """``world`` processes of the command, told their places as torchrun does."""
        return [self.lwm.start(*words, **place, **env) for place in _places(world)]

    def finish(self, processes: list[subprocess.Popen[str]], seconds: float = 200) -> list[tuple[str, str]]:
        """What each has said, once all have ended."""
        try:
            return [process.communicate(timeout=seconds) for process in processes]
        finally:
            for process in processes:
                process.kill()

    def run(self, world: int, *words: str, **env: str) -> list[tuple[str, str]]:
        """Start them and wait for a good end."""
        processes = self.start(world, *words, **env)
        said = self.finish(processes)
        assert [process.returncode for process in processes] == [0] * world, said
        return said

    def launch(self, world: int, *words: str) -> subprocess.Popen[str]:
        """The launcher itself, ``torchrun --no-python lwm ...``."""
        script = self.folder / "lwm"
        script.write_text(f"#!{sys.executable}\nimport sys\nfrom lwm_core.cli import main\nsys.exit(main())\n")
        script.chmod(0o755)
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(world), "--no-python", str(script)]
        return subprocess.Popen(
            [sys.executable, *launcher, *words], cwd=self.folder, env=self.env, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip

    def noted(self, name: str) -> dict[str, str]:
        """The environment in which what is fed is written down in a folder of this name."""
        (self.folder / name).mkdir()
        return {"NOTED": str(self.folder / name)}

    def process_of(self, name: str, rank: int) -> int | None:
        """The process that is this rank and has been fed something."""
        found = list((self.folder / name).glob(f"{rank}-*.jsonl"))
        return int(found[0].stem.partition("-")[2]) if found else None

    def fed(self, name: str) -> tuple[dict[tuple[int, int, int], str], set[int]]:
        """(stage, step, row of the whole batch) → digest, as all processes agree; among how many data ranks."""
        found: dict[tuple[int, int, int], str] = {}
        worlds = set()
        for path in (self.folder / name).glob("*.jsonl"):
            for line in path.read_text().splitlines():
                one = json.loads(line)
                worlds.add(one["ranks"])
                place = one["stage"], one["step"], one["row"]
                assert found.setdefault(place, one["digest"]) == one["digest"], f"{place} was fed in two ways"
        return found, worlds


@pytest.fixture
def ranks(lwm: Any, tmp_path: Path, planted: Callable[..., None]) -> Ranks:
    """Processes of the command in ``tmp_path``."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "noted_feed.py").write_text(NOTED)
    planted(site, "lwm-noted", {"lwm.data.v1": {"noted": "noted_feed:spec"}})
    lwm.env = {key: value for key, value in os.environ.items() if not key.startswith("LWM_")}
    lwm.env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(site)}
    (tmp_path / "extend.toml").write_text(EXTEND)
    return Ranks(lwm)
