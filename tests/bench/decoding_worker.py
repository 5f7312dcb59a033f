"""The worker's side of the benchmark ``decoding``: one of three programs writes after a prompt, token by token.

``argv[1]`` is JSON: ``side`` (``jax``, ``torch`` or ``transformers``), ``model`` (its folder), ``cores`` and
``context``. A request is ``{"do": "about"}`` or ``{"do": "write", "tokens": N, "cache": …}``, whose reply has the
tokens and the seconds at which each came.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

Write = Callable[[int, str | None], Iterator[int]]


def prompt(context: int, vocabulary: int) -> list[int]:
    """The same random tokens for all."""
    ids: list[int] = np.random.default_rng(0).integers(0, vocabulary, context).tolist()
    return ids


def ours(side: str, case: dict[str, Any]) -> Write:
    """A trainer's generator on the folder's parameters."""
    from lwm_core.protocols import OptimizerSpec, Stage, TrainerContext
    from lwm_core.registry import Registry
    from lwm_core.weights import read_model_folder

    found, registry = read_model_folder(Path(case["model"])), Registry.from_environment()
    named = {"attention": f"{side}-ring", "trainer": side}
    load: dict[str, Any] = {kind: registry.load(kind, name) for kind, name in named.items()}
    options: dict[str, Any] = {kind: registry.resolve(kind, name, "options") for kind, name in named.items()}
    attention = options["attention"]()
    context = TrainerContext(found.model, load["attention"], attention, OptimizerSpec(), {"text": 1.0}, seed=0)
    made = load["trainer"](options["trainer"](), context)
    length = case["context"]
    made.begin_stage(Stage("read", length, found.rope, length, length, 1e-3, 1e-3, mesh="1,1,1,1"))
    made.load_parameters(found.parameters)
    ids = prompt(length, found.model.vocabulary.size)
    generator = made.generator()

    def write(tokens: int, cache: str | None) -> Iterator[int]:
        from lwm_core.protocols import SamplingSpec

        yield from generator.stream(ids, SamplingSpec(tokens))

    return write


def transformers(case: dict[str, Any]) -> Write:
    """``generate`` of the library, with the cache that the request names."""
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria

    model = AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32).eval()
    ids = torch.tensor([prompt(case["context"], model.config.vocab_size)])

    class Told(StoppingCriteria):  # type: ignore[misc]
        """Never stops; keeps each token with the time at which it came."""

        def __init__(self) -> None:
            self.came: list[tuple[int, float]] = []

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            self.came.append((int(input_ids[0, -1]), time.perf_counter()))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    def write(tokens: int, cache: str | None) -> Iterator[int]:
        told = Told()
        how: dict[str, Any] = {} if cache is None else {"cache_implementation": cache}
        with torch.no_grad():
            model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                           stopping_criteria=[told], **how)  # fmt: skip
        for token, at in told.came:
            times.append(at)
            yield token

    times: list[float] = []
    write.times = times  # type: ignore[attr-defined]
    return write


PACKAGES = {
    "jax": ("lwm-jax-ring", "jax"), "torch": ("lwm-torch-ring", "torch"), "transformers": ("transformers", "torch"),
}  # fmt: skip


def main() -> None:
    """Answer requests on the standard streams until the input ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not meet the replies
    case = json.loads(sys.argv[1])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: case["cores"]])  # before any library counts cores
    side = case["side"]
    write = transformers(case) if side == "transformers" else ours(side, case)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "about":
                names = ("numpy", *PACKAGES[side])
                reply: Any = {"versions": {"python": sys.version.split()[0], **{n: version(n) for n in names}}}
            else:
                times = getattr(write, "times", [])
                times.clear()
                tokens: list[int] = []
                for token in write(request["tokens"], request.get("cache")):
                    tokens.append(token)
                    if side != "transformers":
                        times.append(time.perf_counter())
                reply = {"tokens": tokens, "seconds": [at - times[0] for at in times]}
        except Exception as error:  # told to the coordinator, which ends the run
            traceback.print_exc()
            reply = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
        print(json.dumps(reply), file=replies)


if __name__ == "__main__":
    main()
