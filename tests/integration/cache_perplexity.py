"""``python cache_perplexity.py jax|torch KIND…``: how well the shipped base model predicts the shipped text, token by
token, with its cache kept as each KIND; prints perplexities as JSON.

Every scored token sees one page that the cache has rounded, and those since then.

Shapes: B rows, V text ids.
"""

from __future__ import annotations

import json
import lzma
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from lwm_core.protocols import OptimizerSpec, Stage, TrainerContext
from lwm_core.registry import Registry
from lwm_core.weights import read_model_folder
from lwm_hf.tokenizer import load_tokenizer
from lwm_tiny_base.bundle import tiny_base

ROWS, CONTEXT, PREFIX = 16, 256, 128


def text_rows(folder: Path) -> np.ndarray:
    """``[ROWS, CONTEXT]`` ids of passages spread over the text."""
    with lzma.open(files("lwm_data") / "corpora" / "kjv.txt.xz", "rt", encoding="utf-8") as file:  # type: ignore
        lines = file.read().splitlines()
    tokenizer = load_tokenizer(folder)
    starts = np.linspace(0, len(lines) - 100, ROWS).astype(int)
    return np.array([tokenizer.encode("\n".join(lines[at : at + 60]))[:CONTEXT] for at in starts])


def make(side: str, kind: str, folder: Path) -> Any:
    """A trainer with the shipped parameters."""
    registry, found = Registry.from_environment(), read_model_folder(folder)
    named = {"attention": f"{side}-ring", "trainer": side}
    load: dict[str, Any] = {kind_: registry.load(kind_, name) for kind_, name in named.items()}
    options: dict[str, Any] = {kind_: registry.resolve(kind_, name, "options") for kind_, name in named.items()}
    context = TrainerContext(
        found.model, load["attention"], options["attention"](), OptimizerSpec(), {"text": 1.0}, seed=0
    )  # fmt: skip
    trainer = load["trainer"](options["trainer"](cache=kind), context)
    trainer.begin_stage(Stage("s", CONTEXT, found.rope, CONTEXT, CONTEXT, 1e-3, 1e-3, mesh="1,1,1,-1"))
    trainer.load_parameters(found.parameters)
    return trainer


def logits_after(side: str, trainer: Any) -> Any:
    """A function that reads one token or more of each row and gives the logits ``[B,V]`` after them."""
    ids = trainer.context.model.vocabulary.slices["text"]
    if side == "torch":
        from lwm_torch_ring.generate.prompts import Prompts

        rows = Prompts(trainer, ROWS)

        def read(tokens: list[list[int]]) -> np.ndarray:
            with trainer.gathering():
                rows.read(tokens)
            assert rows._logits is not None
            return rows._logits[:, ids].double().numpy()

        return read
    from lwm_jax_ring.generate.rows import Rows

    of_jax = Rows(trainer, trainer.generator()._programs, ROWS)

    def read_jax(tokens: list[list[int]]) -> np.ndarray:
        of_jax.read(tokens)
        ends, head = (np.asarray(x, np.float64) for x in (of_jax._ends, of_jax._weights.heads["text"]))
        return ends @ head.T

    return read_jax


def perplexity(side: str, kind: str) -> float:
    """Of the second half of the passages, after the first."""
    folder = tiny_base().folder
    rows = text_rows(folder)
    read, total = logits_after(side, make(side, kind, folder)), 0.0
    logits = read(rows[:, :PREFIX].tolist())
    for at in range(PREFIX, CONTEXT):
        top = logits.max(axis=1, keepdims=True)
        log_p = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
        total -= log_p[np.arange(ROWS), rows[:, at]].sum()
        logits = read(rows[:, at : at + 1].tolist())
    return float(np.exp(total / (ROWS * (CONTEXT - PREFIX))))


if __name__ == "__main__":
    print(json.dumps({kind: perplexity(sys.argv[1], kind) for kind in sys.argv[2:]}))
