"""A bigram model ``logits(next | x) = H · e(x)`` under SGD with momentum, exact to the bit after a restore.

Its parameters stand under the canonical names of the whole Llama, so that exports are real model folders; only the
embedding and the head are trained. Shapes: B rows, S tokens, V vocabulary, E hidden size.

In several processes each feeds its rows, all compute the whole step from everyone's, so every bit is as in one process;
each writes its share of the state.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from lwm_core.batch import PackedBatch
from lwm_core.errors import CheckpointError, LwmError, ShapeError
from lwm_core.layout import SequenceLayout
from lwm_core.mesh import resolve_mesh
from lwm_core.model import canonical_shapes
from lwm_core.protocols import Processes, SamplingSpec, Stage, TrainerContext
from lwm_standin.options import TrainerOptions
from lwm_standin.processes import Siblings, join

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_MOMENTUM = 0.9


class _Save:
    """A save that reaches the disk after a while: each rank's file gets its name only then."""

    def __init__(self, folder: Path, processes: Processes, seconds: float) -> None:
        rank, world = processes.rank, processes.world
        self._own = folder / f"state_{rank}.npz"
        awaited = range(world) if rank == 0 else (rank,)
        self._awaited = [folder / f"state_{one}.npz" for one in awaited]
        self._thread = threading.Timer(seconds, self._arrive)
        self._thread.daemon = True
        self._thread.start()

    def _arrive(self) -> None:
        with suppress(FileNotFoundError):  # another rank's part has failed, and the folder is gone
            self._own.with_suffix(".partial").rename(self._own)

    def done(self) -> bool:
        return all(path.exists() for path in self._awaited)

    def wait(self) -> None:
        while not self.done():
            time.sleep(0.002)


class StandinTrainer:
    """See the module."""

    def __init__(self, options: TrainerOptions, context: TrainerContext) -> None:
        self.processes = join()
        self._options = options
        self._context = context
        self._names = (EMBED, EMBED if context.model.tie_embeddings else HEAD)
        random = np.random.default_rng(context.seed)
        self._parameters = {
            name: (np.ones(shape, np.float32) if len(shape) == 1 else random.normal(0, 0.3, shape).astype(np.float32))
            for name, shape in canonical_shapes(context.model).items()
        }
        self._momentum: dict[str, Any] = {}
        self._steps = 0
        self._saves = 0
        self._stage: Stage | None = None

    def begin_stage(self, stage: Stage) -> None:
        self._sizes = resolve_mesh(stage.mesh, self._options.devices)
        self._stage = stage
        self._momentum = {name: np.zeros_like(self._parameters[name]) for name in set(self._names)}

    def choices(self) -> Sequence[str]:
        return ()

    @property
    def layout(self) -> SequenceLayout:
        assert self._stage is not None
        options = self._context.attention_options
        return self._context.attention.layout(options, self._stage.seq_len, self._sizes["sp"])

    def data_rank(self, stage: Stage) -> tuple[int, int]:
        """As many data ranks as processes, or one, where the rows do not divide: then all feed the same."""
        world = self.processes.world
        return (self.processes.rank, world) if stage.rows % world == 0 else (0, 1)

    def step(self, batch: PackedBatch, step: int) -> dict[str, float]:
        assert self._stage is not None
        time.sleep(self._options.step_seconds)
        self._steps += 1
        batch = self._whole(batch)
        loss, gradients = self._loss(batch)
        norm = float(np.sqrt(sum(float(np.sum(g.astype(np.float64) ** 2)) for g in gradients.values())))
        lr = self._stage.lr_at(step)
        for name, gradient in gradients.items():
            self._momentum[name] = np.float32(_MOMENTUM) * self._momentum[name] + gradient
            self._parameters[name] -= np.float32(lr) * self._momentum[name]
        if self._options.nan_at == self._steps:
            loss = float("nan")
        return {"loss": loss, "loss_text": loss, "grad_norm": norm, "lr": lr}

    def _whole(self, batch: PackedBatch) -> PackedBatch:
        """Every process's rows, in the order of ranks."""
        assert self._stage is not None
        if self.data_rank(self._stage) == (0, 1) or not isinstance(self.processes, Siblings):
            return batch
        parts = self.processes.gather("rows", batch)
        return PackedBatch(**{f.name: np.concatenate([getattr(one, f.name) for one in parts]) for f in fields(batch)})

    def _loss(self, batch: PackedBatch) -> tuple[float, dict[str, Any]]:
        embed, head = (self._parameters[name] for name in self._names)
        x, y, w = batch.tokens.ravel(), batch.targets.ravel(), batch.loss_weights.ravel()
        probabilities = _softmax(embed[x] @ head.T)
        picked = probabilities[np.arange(len(y)), y]
        share = w / w.sum()
        loss = float(-np.sum(share * np.log(picked), dtype=np.float64))
        probabilities[np.arange(len(y)), y] -= 1.0
        error = probabilities * share[:, None]
        gradients: dict[str, Any] = {name: np.zeros_like(self._parameters[name]) for name in self._names}
        np.add.at(gradients[self._names[0]], x, error @ head)
        gradients[self._names[1]] += error.T @ embed[x]
        return loss, gradients

    def evaluate(self, batch: PackedBatch) -> dict[str, float]:
        loss = self._loss(self._whole(batch))[0]
        return {"loss": loss, "loss_text": loss}

    def save(self, folder: Path) -> _Save:
        self._saves += 1
        rank, world = self.processes.rank, self.processes.world
        assert world > 1 or not any(folder.iterdir()), "the core must give an empty folder"
        arrays = {f"p:{name}": value for name, value in self._parameters.items()}
        arrays |= {f"m:{name}": value for name, value in self._momentum.items()}
        if self._options.full_at == self._saves and self._options.full_rank == rank:
            (folder / "half.npz").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        mine = {key: value for number, (key, value) in enumerate(sorted(arrays.items())) if number % world == rank}
        with (folder / f"state_{rank}.partial").open("wb") as file:
            np.savez(file, steps=np.int64(self._steps), **mine)
        return _Save(folder, self.processes, self._options.save_seconds)

    def restore(self, folder: Path) -> None:
        """Whatever number of processes has saved it."""
        state: dict[str, Any] = {}
        for path in sorted(folder.glob("state_*.npz")):
            with np.load(path, allow_pickle=False) as part:
                state |= dict(part)
        self._steps = int(state["steps"])
        self._parameters = {name: state[f"p:{name}"] for name in self._parameters}
        self._momentum = {name: state[f"m:{name}"] for name in self._momentum}

    def iter_parameters(self) -> Iterator[tuple[str, Any]]:
        for name, value in self._parameters.items():
            _in_step(self.processes, name)
            yield name, value

    def load_parameters(self, parameters: Mapping[str, Any]) -> None:
        for name, shape in canonical_shapes(self._context.model).items():
            if parameters[name].shape != shape:
                raise CheckpointError(f"trainer 'standin': {name} is {parameters[name].shape}; expected {shape}")
            self._parameters[name] = np.array(parameters[name], dtype=np.float32)

    def generator(self) -> _Writer:
        embed, head = (self._parameters[name] for name in self._names)
        slices = self._context.model.vocabulary.slices
        return _Writer(self.processes, embed, head, self._options.token_seconds, slices)

    def scorer(self) -> _Writer:
        return self.generator()

    def describe(self) -> dict[str, Any]:
        return {"device_count": self._options.devices, "peak_flops": self._options.peak_flops, "framework": "numpy"}


class _Writer:
    """Generation and scores from the two tables."""

    def __init__(
        self, processes: Processes, embed: Any, head: Any, token_seconds: float, slices: Mapping[str, slice]
    ) -> None:
        self._processes = processes
        self._slices = slices
        self._embed, self._head = embed, head
        self._seconds = token_seconds

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingSpec) -> list[list[int]]:
        return [list(self.stream(prompt, sampling)) for prompt in prompts]

    def stream(self, prompt: Sequence[int], sampling: SamplingSpec) -> Iterator[int]:
        random = np.random.default_rng(sampling.seed)
        last = prompt[-1]
        own = self._slices[sampling.modality]
        for _ in range(sampling.max_new_tokens):
            _in_step(self._processes, "token")
            time.sleep(self._seconds)
            logits = self._head[own] @ self._embed[last]
            if sampling.temperature == 0:
                last = own.start + int(np.argmax(logits))
            else:
                p = _softmax(logits[None].astype(np.float64) / sampling.temperature)[0]
                last = own.start + int(random.choice(len(p), p=p))
            if last in sampling.stop_ids:
                return
            yield last

    def session(self) -> _Talk:
        return _Talk(self)

    def log_likelihood(self, tokens: Sequence[int]) -> Any:
        _in_step(self._processes, "score")
        ids = np.asarray(tokens)
        p = _softmax(self._embed[ids[:-1]] @ self._head.T)
        return np.log(p[np.arange(len(ids) - 1), ids[1:]])


class _Talk:
    """A session: the model sees the last token alone, so there is nothing to keep but the tokens."""

    def __init__(self, writer: _Writer) -> None:
        self._writer: _Writer | None = writer
        self._tokens: list[int] = []

    @property
    def tokens(self) -> Sequence[int]:
        return tuple(self._tokens)

    def read(self, tokens: Sequence[int]) -> None:
        self._usable()
        if not len(tokens):
            raise ShapeError("generate: 0 tokens were read; expected at least 1")
        self._tokens += tokens

    def stream(self, sampling: SamplingSpec) -> Iterator[int]:
        if not self._tokens:
            raise ShapeError("generate: nothing was read yet; read at least 1 token before the first is written")
        for token in self._usable().stream(self._tokens, sampling):
            self._tokens.append(token)
            yield token

    def close(self) -> None:
        self._writer = None

    def _usable(self) -> _Writer:
        if self._writer is None:
            raise LwmError("generate: this session was closed; open another")
        return self._writer


def _in_step(processes: Processes, what: str) -> None:
    """Where a real model's processes would exchange something: none goes on before all are here."""
    if isinstance(processes, Siblings):
        processes.gather(what, None)


def _softmax(logits: Any) -> Any:
    exponents = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponents / exponents.sum(axis=-1, keepdims=True)
