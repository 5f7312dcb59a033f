"""What the real trainers trained, by ``lwm export``: transformers reads it, and the other trainer starts from it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
for module in ("lwm_torch_ring", "lwm_jax_ring", "lwm_hf", "lwm_data", "lwm_context"):
    pytest.importorskip(module)

pytestmark = pytest.mark.slow

RECIPE = """
name = "leave"
seed = 5
{start}
attention = {{ name = "{trainer}-ring" }}
data = {{ name = "mix", sources.text = {{ kind = "text", corpus = "kjv" }}, weights = {{ text = 1.0 }} }}
evals = []

[trainer]
name = "{trainer}"
compute_dtype = "float32"
{where}

[context]
name = "progressive"
from = 64
lengths = [256]
tokens = [{tokens}]
batch_tokens = 1024
lr = {lr}
mesh = ["{mesh}"]
{rope}
"""
FRESH = """
model = { preset = "debug", hidden_size = 32, intermediate_size = 64, num_layers = 2, num_heads = 4, num_kv_heads = 2 }
tokenizer = { name = "hf", train = { files = ["lwm-data:corpora/kjv.txt.xz"], vocab_size = 320 } }
"""
TRAINERS = {
    "torch": (2, 'device = "cpu"', ("1,1,2,1", "1,2,1,1")),
    "jax": (1, "host_devices = 4", ("1,2,2,1", "1,1,2,2")),
}
"""Name → processes, options, meshes: of the one that trains, and of the one that starts from what was trained."""

TEXT = "And God said, Let there be light: and there was light. </s> 42"

SCORE = """
import json, sys
from pathlib import Path
from lwm_core.run import lead, reopen
opened = reopen(Path(sys.argv[1]))
def score(model):
    print(json.dumps(model.scorer().log_likelihood(json.loads(sys.argv[2])).tolist()))
lead(opened.trainer, score)
"""


@pytest.fixture
def everything(lwm: Any) -> Any:
    """The command with every installed plugin."""
    lwm.env = {key: value for key, value in os.environ.items() if not key.startswith("LWM_")}
    lwm.env["OMP_NUM_THREADS"] = "1"
    return lwm


def do(lwm: Any, trainer: str, *words: str, script: str | None = None) -> str:
    """What rank 0 of the trainer's processes says, of the command or of a script."""
    world = TRAINERS[trainer][0]
    ranks: dict[str, str] = {}
    if world > 1:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            ranks = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                     "MASTER_PORT": str(one.getsockname()[1])}  # fmt: skip
    if script is not None:
        lwm = type(lwm)(lwm.cwd, lwm.env)
        lwm.arguments = lambda *words: [sys.executable, "-c", script, *words]
    processes = [
        lwm.start(*words, **ranks, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks else {}))
        for rank in range(world)
    ]
    try:
        said = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world, said
    return said[0][0]


def scored(lwm: Any, trainer: str, run: str, ids: list[int]) -> np.ndarray:
    return np.array(json.loads(do(lwm, trainer, run, json.dumps(ids), script=SCORE).splitlines()[-1]))


@pytest.mark.parametrize(("trainer", "other"), [("torch", "jax"), ("jax", "torch")])
def test_a_trained_model_leaves_and_is_taken_up(trainer: str, other: str, everything: Any, tmp_path: Path) -> None:
    rope = 'theta = [500_000.0]\nscaling = { name = "llama3" }'
    for name, recipe in (
        ("first", {"trainer": trainer, "start": FRESH, "tokens": 8192, "lr": 3e-3, "rope": rope,
                   "mesh": TRAINERS[trainer][2][0]}),
        ("second", {"trainer": other, "start": 'init = "./out"\ntokenizer = { name = "hf" }', "tokens": 1024,
                    "lr": 1e-15,  # a step that changes nothing
                    "rope": 'theta = ["keep"]', "mesh": TRAINERS[other][2][1]}),
    ):  # fmt: skip
        (tmp_path / f"{name}.toml").write_text(RECIPE.format(where=TRAINERS[str(recipe["trainer"])][1], **recipe))
    do(everything, trainer, "run", "first.toml", "--out", "first")
    shutil.rmtree(tmp_path / "first" / "model")  # so that the checkpoint is what is left
    told = do(everything, trainer, "export", "first", "out", "--dtype", "float32")
    assert "parameters of first/checkpoints/step_" in told

    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.config.rope_parameters["rope_type"] == "llama3" and loaded.config.rope_parameters["factor"] == 4.0
    from lwm_hf.tokenizer import load_tokenizer

    own = load_tokenizer(tmp_path / "out")
    for role in ("bos", "eos", "pad"):
        ids = {getattr(of, f"{role}_token_id") for of in (loaded.config, loaded.generation_config, tokenizer)}
        assert ids == {own.special_ids[role]}, role
    ids = own.encode(TEXT)
    assert tokenizer.encode(TEXT, add_special_tokens=False, split_special_tokens=True) == ids
    assert tokenizer.decode(ids) == TEXT

    with torch.no_grad():
        logits = loaded(torch.tensor([ids])).logits[0, :-1].double()
    theirs = logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()
    assert theirs.std() > 0.1  # it has learnt that some are likelier
    np.testing.assert_allclose(scored(everything, trainer, "first", ids), theirs, atol=1e-4, rtol=0)

    do(everything, other, "run", "second.toml", "--out", "second")
    np.testing.assert_allclose(scored(everything, other, "second", ids), theirs, atol=1e-4, rtol=0)
