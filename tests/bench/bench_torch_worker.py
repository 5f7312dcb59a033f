"""The worker's side of a Torch benchmark: one rank that stays up and answers requests, a line of JSON each way.

Every side of a comparison is timed by this one file, so that nothing but the attention differs between them.

Shapes: B batch, S sequence, C tokens of this rank, H heads, D head dim.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

INPUTS = ("q", "k", "v", "dout")
RESULTS = {"forward": ("out",), "forward+backward": ("out", "dq", "dk", "dv")}
SECONDS = 900.0
"""That a transfer may take before gloo gives it up."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Program:
    """What is run.

    Args:
        attend: causal attention: q, k, v ``[1,C,H,D]`` to out ``[1,C,H,D]``.
        places: ``[C]``, the places in natural order of the tokens that it wants.
        heads_first: whether all of these are ``[1,H,C,D]`` instead.
    """

    attend: Attend
    places: NDArray[Any]
    heads_first: bool = False


@dataclass(frozen=True)
class Subject:
    """What one worker times.

    Args:
        program: for the number of tokens S, and what a request says of ``how``.
        packages: distributions whose versions belong to the result.
        about: anything else that does.
    """

    program: Callable[[int, Any], Program]
    packages: tuple[str, ...]
    about: dict[str, Any] = field(default_factory=dict)


def _results(attend: Attend, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, kind: str) -> tuple[Tensor, ...]:
    """out, and where the kind says so the gradients of q, k and v for the cotangent dout."""
    if kind not in RESULTS:
        raise ValueError(f"there is no kind {kind!r}; expected {' or '.join(RESULTS)}")
    if kind == "forward":
        with torch.no_grad():
            return (attend(q, k, v),)
    out = attend(q, k, v)
    return (out, *torch.autograd.grad(out, (q, k, v), dout))


class Desk:
    """Answers requests about one subject; the inputs lie on this rank, in its order, before any clock starts."""

    def __init__(self, subject: Subject, case: dict[str, Any]) -> None:
        self._subject, self._case, self._folder = subject, case, Path(case["folder"])
        self._ready: dict[tuple[int, str], tuple[Program, tuple[Tensor, ...]]] = {}
        self._warm: set[tuple[int, str, str]] = set()

    def about(self) -> dict[str, Any]:
        """Versions, threads and what the subject says of itself."""
        versions = {name: version(name) for name in self._subject.packages}
        return {
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__, **versions},
            "threads": torch.get_num_threads(),
            **self._subject.about,
        }

    def time(self, kind: str, how: Any = None, tokens: int | None = None) -> dict[str, float]:
        """Seconds until all ranks are done, all begun together; the first time anything runs is not measured."""
        program, arrays = self._program(how, tokens)
        key = len(program.places), json.dumps(how), kind
        if key not in self._warm:
            _results(program.attend, *arrays, kind)
            self._warm.add(key)
        self._together()
        start = time.perf_counter()
        _results(program.attend, *arrays, kind)
        self._together()
        return {"seconds": time.perf_counter() - start}

    def save(self, kind: str, name: str, how: Any = None) -> dict[str, Any]:
        """Write this rank's results as ``<name>-<result>-<rank>.npy``, and the natural places of its tokens."""
        program, arrays = self._program(how, None)
        files = {}
        for result, array in zip(RESULTS[kind], _results(program.attend, *arrays, kind), strict=True):
            files[result] = f"{name}-{result}-{self._case['rank']}.npy"
            host = array.detach().transpose(1, 2) if program.heads_first else array.detach()
            np.save(self._folder / files[result], host.numpy())
        places = f"{name}-places-{self._case['rank']}.npy"
        np.save(self._folder / places, program.places)
        return {"files": files, "places": places}

    def _together(self) -> None:
        if dist.is_initialized():
            dist.barrier()

    def _program(self, how: Any, tokens: int | None) -> tuple[Program, tuple[Tensor, ...]]:
        seq_len = self._case["seq_len"] if tokens is None else tokens
        key = seq_len, json.dumps(how)
        if key not in self._ready:
            program = self._subject.program(seq_len, how)
            whole = [np.load(self._folder / f"{name}.npy", mmap_mode="r") for name in INPUTS]
            arrays = tuple(torch.from_numpy(array[:, program.places]) for array in whole)
            if program.heads_first:
                arrays = tuple(x.transpose(1, 2).contiguous() for x in arrays)
            for x in arrays[:3]:
                x.requires_grad_()
            self._ready = {key: (program, arrays)}  # one at a time: they are large
        return self._ready[key]


def _join(case: dict[str, Any]) -> None:
    """Set the threads, and form a gloo group where there are several ranks."""
    torch.set_num_threads(case["threads"])
    if case["world"] == 1:
        return
    if "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo looks this host's name up, which may be unknown
    dist.init_process_group(
        "gloo", init_method=f"file://{case['store']}", rank=case["rank"], world_size=case["world"],
        timeout=timedelta(seconds=SECONDS),
    )  # fmt: skip


def serve(make: Callable[[dict[str, Any]], Subject]) -> None:
    """Answer requests on the standard streams until the input ends.

    ``argv[1]`` is JSON: ``folder`` (the inputs), ``seq_len``, ``rank``, ``world``, ``threads`` and ``store`` (where
    ranks meet). A request names a method of :class:`Desk` under ``do`` and its arguments beside it; the reply is what
    the method returns, or ``{"error": one line}``.
    """
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not meet the replies
    case = json.loads(sys.argv[1])
    _join(case)
    desk = Desk(make(case), case)
    answers = {"about": desk.about, "time": desk.time, "save": desk.save}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply: Any = answers[request.pop("do")](**request)
        except Exception as error:  # whatever the attention raises is told to the coordinator, which ends the run
            traceback.print_exc()
            reply = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
        print(json.dumps(reply), file=replies)
    os._exit(0)  # no goodbye: a rank that is gone would not answer it
