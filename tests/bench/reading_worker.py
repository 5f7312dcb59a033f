"""One measurement of the benchmark ``reading``, in a process of its own.

``python reading_worker.py SIDE TASK TOKENS``: the trainer ``jax`` or ``torch`` reads that many tokens with the ``tiny``
preset and writes two more (``prefill``), or scores them (``score``). Prints one JSON line: bytes resident before and at
most, and seconds, compiling included.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

from lwm_core.model import preset
from lwm_core.protocols import OptimizerSpec, SamplingSpec, Stage, TrainerContext
from lwm_core.registry import Registry
from lwm_core.rope import RopeSpec
from lwm_core.vocab import Vocabulary

TEXT_SIZE, KV_HEADS = 4096, 2
MEBIBYTE = 1 << 20


def make_trainer(side: str, tokens: int) -> Any:
    """A trainer with fresh parameters, on one device, every option at its default."""
    registry, named = Registry.from_environment(), {"attention": f"{side}-ring", "trainer": side}
    load: dict[str, Any] = {kind: registry.load(kind, name) for kind, name in named.items()}
    options: dict[str, Any] = {kind: registry.resolve(kind, name, "options") for kind, name in named.items()}
    model = preset("tiny", Vocabulary(TEXT_SIZE), num_kv_heads=KV_HEADS)
    context = TrainerContext(
        model, load["attention"], options["attention"](), OptimizerSpec(), {"text": 1.0}, seed=0
    )  # fmt: skip
    trainer = load["trainer"](options["trainer"](), context)
    trainer.begin_stage(Stage("read", tokens, RopeSpec(5e7), tokens, tokens, 1e-3, 1e-3, mesh="1,1,1,1"))
    return trainer


def most() -> int:
    """Bytes that were resident at most so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(side: str, task: str, tokens: int) -> dict[str, Any]:
    """Do it and tell."""
    trainer, ids = make_trainer(side, tokens), [n % TEXT_SIZE for n in range(tokens)]
    before, began = most(), time.perf_counter()
    if task == "score":
        found = len(trainer.scorer().log_likelihood(ids)) + 1
    else:
        found = tokens + len(trainer.generator().generate([ids], SamplingSpec(2))[0]) - 2
    assert found == tokens
    return {"before": before, "most": most(), "seconds": time.perf_counter() - began}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
