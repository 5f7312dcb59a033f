"""The worker's side of a benchmark: a process that stays up and answers requests, one line of JSON each way.

Both attentions are timed by this one file, each under its own JAX, so that nothing but the attention differs between
them. It therefore uses only what JAX 0.4.31 and later share, and no package of this repository.

Shapes: B batch, S sequence, H heads, D head dim.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Chunks = tuple[int, int]

INPUTS = ("q", "k", "v", "dout")
RESULTS = {"forward": ("out",), "forward+backward": ("out", "dq", "dk", "dv")}


@dataclass(frozen=True)
class Subject:
    """What one worker times.

    Args:
        mesh: four axes, the sequence on ``sp``.
        attend: causal attention for (query chunk, key chunk): q, k, v ``[B,S,H,D]`` to out ``[B,S,H,D]``.
        chunks: what ``attend`` is given where a request names none; None where every request must.
        packages: distributions whose versions belong to the result.
        order: the place in natural order of each token as ``attend`` wants them; None for natural order itself.
    """

    mesh: Mesh
    attend: Callable[[Chunks], Attend]
    chunks: Chunks | None
    packages: tuple[str, ...]
    order: np.ndarray | None = None


def forward_backward(attend: Attend) -> Callable[..., tuple[jax.Array, ...]]:
    """Out and the gradients of q, k and v for the cotangent ``dout``."""

    def run(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> tuple[jax.Array, ...]:
        out, pullback = jax.vjp(attend, q, k, v)
        return (out, *pullback(dout))

    return run


@dataclass
class Desk:
    """Answers requests about one subject; the inputs lie sharded on its devices before any clock starts."""

    subject: Subject
    folder: Path
    programs: dict[tuple[str, Chunks], tuple[Callable[..., Any], tuple[jax.Array, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        arrays = [np.load(self.folder / f"{name}.npy") for name in INPUTS]
        if self.subject.order is not None:
            arrays = [array[:, self.subject.order] for array in arrays]
        sharding = NamedSharding(self.subject.mesh, P(None, "sp"))
        self.inputs = tuple(jax.device_put(array, sharding) for array in arrays)

    def about(self) -> dict[str, Any]:
        """Versions, devices and the chunks used where none are asked for."""
        return {
            "versions": {"python": sys.version.split()[0], **{name: version(name) for name in self.subject.packages}},
            "devices": len(jax.devices()),
            "chunks": self.subject.chunks,
        }

    def time(self, kind: str, chunks: list[int] | None = None) -> dict[str, float]:
        """Seconds of one call; the first request for a program compiles it and runs it once, unmeasured."""
        program, arguments = self._program(kind, chunks)
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        return {"seconds": time.perf_counter() - start}

    def save(self, kind: str, name: str, chunks: list[int] | None = None) -> dict[str, list[str]]:
        """Write the results in natural order as ``<name>-<result>.npy`` into the folder of the inputs."""
        program, arguments = self._program(kind, chunks)
        results = program(*arguments)
        files = []
        for result, array in zip(RESULTS[kind], results if isinstance(results, tuple) else (results,), strict=True):
            host = np.asarray(array)
            if self.subject.order is not None:
                host = host[:, np.argsort(self.subject.order)]
            files.append(f"{name}-{result}.npy")
            np.save(self.folder / files[-1], host)
        return {"files": files}

    def matmul(self, size: int, repeats: int) -> dict[str, float]:
        """Median seconds of a float32 product of two ``[size,size]`` matrices on the whole host, after a warm-up."""
        matrix = jax.device_put(jnp.ones((size, size), jnp.float32), jax.devices()[0])
        product = jax.jit(jnp.matmul)
        product(matrix, matrix).block_until_ready()
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            product(matrix, matrix).block_until_ready()
            seconds.append(time.perf_counter() - start)
        return {"seconds": statistics.median(seconds)}

    def _program(self, kind: str, chunks: list[int] | None) -> tuple[Callable[..., Any], tuple[jax.Array, ...]]:
        if kind not in RESULTS:
            raise ValueError(f"there is no kind {kind!r}; expected {' or '.join(RESULTS)}")
        chosen = self.subject.chunks if chunks is None else (chunks[0], chunks[1])
        if chosen is None:
            raise ValueError("this attention has no chunks of its own; the request must name them")
        if (kind, chosen) not in self.programs:
            attend = self.subject.attend(chosen)
            backward = kind == "forward+backward"
            program = jax.jit(forward_backward(attend) if backward else attend)
            arguments = self.inputs if backward else self.inputs[:3]
            jax.block_until_ready(program(*arguments))
            self.programs[kind, chosen] = program, arguments
        return self.programs[kind, chosen]


def serve(make: Callable[[dict[str, Any]], Subject]) -> None:
    """Answer requests on the standard streams until the input ends.

    ``argv[1]`` is JSON: ``folder`` (the inputs), ``seq_len`` and ``world``. A request names a method of :class:`Desk`
    under ``do`` and its arguments beside it; the reply is what the method returns, or ``{"error": one line}``.
    """
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not meet the replies
    case = json.loads(sys.argv[1])
    desk = Desk(make(case), Path(case["folder"]))
    answers = {"about": desk.about, "time": desk.time, "save": desk.save, "matmul": desk.matmul}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply: Any = answers[request.pop("do")](**request)
        except Exception as error:  # whatever the attention raises is told to the coordinator, which ends the run
            traceback.print_exc()
            reply = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
        print(json.dumps(reply), file=replies)
