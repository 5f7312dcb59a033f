"""Part of ``attention-gpu-torch``: one forward pass of LWM's 7B shape over 1,048,576 tokens on the one GPU.

A command does as many layers as it has time for and puts the stream away under ``build/``; the next one goes on there,
until all layers and the loss are done. What was put away is removed once the result is written. Parameters are random:
what is measured does not depend on them.

Shapes: B batch, S sequence, E hidden size; B is 1.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from bench_torch_gpu import Figure, Part, Setting, seconds, wait
from safetensors.torch import load_file, save_file
from torch import Tensor

from lwm_core.attention import AttentionMask
from lwm_core.errors import LwmError
from lwm_core.model import ModelConfig, preset
from lwm_core.protocols import AttentionAxes
from lwm_core.rope import RopeSpec
from lwm_core.vocab import Vocabulary
from lwm_torch_ring.attention.backend import factory
from lwm_torch_ring.attention.options import AttentionOptions
from lwm_torch_ring.model.llama import Block, Compute, RMSNorm, initial
from lwm_torch_ring.model.loss import log_likelihoods
from lwm_torch_ring.model.rope import rope_angles, rope_tables

FOLDER = Path("build") / "attention-gpu-torch-million"
SEQ_LEN, TOKEN_CHUNK, LOSS_CHUNK = 1_048_576, 32_768, 4096
SECONDS = 420.0
"""After which no further layer is begun in a command."""

SEED = 0


def shape(setting: Setting) -> tuple[ModelConfig, int]:
    """The model and the length."""
    if setting.small:
        return preset("debug", Vocabulary(256), num_layers=3), 512
    return preset("7b", Vocabulary(32_000)), SEQ_LEN


class Forward:
    """The pass, wherever it stands: ``progress.json`` says, ``stream.safetensors`` holds the stream."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        self._setting, self._folder = setting, folder
        self.config, self.seq_len = shape(setting)
        self._how = Compute(setting.dtype, token_chunk=64 if setting.small else TOKEN_CHUNK)
        self._backend = factory.build(AttentionOptions(kernel=setting.kernel), None, AttentionAxes(), self.seq_len)
        positions = torch.arange(self.seq_len, device=setting.device)[None]
        tables = rope_tables(RopeSpec(5e7), self.config.head_dim, self.seq_len, setting.device)
        self._cos, self._sin = rope_angles(tables, positions)

    @property
    def _state(self) -> Path:
        return self._folder / "progress.json"

    def begin(self) -> tuple[dict[str, Any], Tensor]:
        """Where it stands: what was measured, and the stream ``[1,S,E]``."""
        about = {"shape": self.config.to_dict(), "S": self.seq_len, "device": str(self._setting.device.type),
                 "dtype": self._setting.dtype_name}  # fmt: skip
        if self._state.is_file():
            found = json.loads(self._state.read_text(encoding="utf-8"))
            if {key: found[key] for key in about} != about:
                raise LwmError(f"attention-gpu-torch: {self._folder} holds another pass; remove it to begin this one")
            stream = load_file(self._folder / "stream.safetensors", device=str(self._setting.device))["stream"]
            return found, stream
        ids = self._tokens()
        table = self._parameter("model.embed_tokens.weight", (self.config.vocabulary.size, self.config.hidden_size))
        return {**about, "seconds": [], "memory": 0}, table.to(self._setting.dtype)[ids]

    def _tokens(self) -> Tensor:
        generator = torch.Generator(self._setting.device).manual_seed(SEED)
        size = self.config.vocabulary.text_size
        return torch.randint(0, size, (1, self.seq_len), generator=generator, device=self._setting.device)

    def _parameter(self, name: str, of: tuple[int, ...]) -> Tensor:
        return initial(name, of, self.config, SEED, self._setting.device)

    def layer(self, number: int, stream: Tensor) -> Tensor:
        """The stream after layer ``number``."""
        with torch.device("meta"):
            block = Block(self.config, number)
        block.to_empty(device=self._setting.device)
        for name, parameter in block.named_parameters():
            parameter.copy_(self._parameter(f"model.layers.{number}.{name}", tuple(parameter.shape)))
        block.to(self._setting.dtype)

        def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
            out: Tensor = self._backend.attend(q, k, v, AttentionMask("causal"))
            return out

        result: Tensor = block(stream, self._cos, self._sin, attend, self._how)
        return result

    def loss(self, stream: Tensor) -> float:
        """The mean negative log-likelihood of all tokens but the first, in slices."""
        norm = RMSNorm(self.config.hidden_size, self.config.rms_norm_eps).to(self._setting.device)
        norm.weight.fill_(1.0)
        head = self._parameter("lm_head.weight", (self.config.vocabulary.size, self.config.hidden_size))
        targets = self._tokens().roll(-1, dims=1)
        total, whole = 0.0, [slice(0, self.config.vocabulary.size)]
        for part, part_targets in zip(stream.split(LOSS_CHUNK, 1), targets.split(LOSS_CHUNK, 1), strict=True):
            scores = log_likelihoods(norm(part), head.to(part.dtype), part_targets, whole, LOSS_CHUNK)
            total -= float(scores.sum(dtype=torch.float64))
        return total / self.seq_len

    def keep(self, found: dict[str, Any], stream: Tensor) -> None:
        """Put it away, so that a command that is cut off loses no more than itself."""
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / "stream.partial"
        save_file({"stream": stream.cpu()}, partial)
        partial.replace(self._folder / "stream.safetensors")
        self._state.write_text(json.dumps(found), encoding="utf-8")


def folder_of(setting: Setting) -> Path:
    """Where a pass is put away."""
    return FOLDER.with_name(f"{FOLDER.name}-smoke") if setting.small else FOLDER


def flops(config: ModelConfig, seq_len: int) -> float:
    """Of a causal forward pass: 2 a parameter of the layers and the head and token, and 2·S²·H·D a layer."""
    matrices = 2.0 * seq_len * (config.parameter_count - config.vocabulary.size * config.hidden_size)
    return matrices + 2.0 * config.num_layers * seq_len**2 * config.num_heads * config.head_dim


@torch.no_grad()
def measure(setting: Setting) -> dict[str, Any]:
    """Go on with the pass; its figures once it is through, else how far it is."""
    forward = Forward(setting, folder_of(setting))
    began = time.monotonic()
    found, stream = forward.begin()
    layers, first = forward.config.num_layers, len(found["seconds"])
    for number in range(first, layers):
        if number > first and time.monotonic() - began > SECONDS:
            break
        wait(setting.device)
        start = time.perf_counter()
        stream = forward.layer(number, stream)
        wait(setting.device)
        once = time.perf_counter() - start
        found["seconds"].append(once)
        setting.console.print(f"[dim]layer {number + 1} of {layers}: {once:.1f} s[/dim]", highlight=False)
    remember_memory(found, setting)
    done = len(found["seconds"])
    if done > first:
        forward.keep(found, stream)
    if done < layers:
        setting.console.print(f"{done} of {layers} layers are done; the same command goes on there")
    else:
        found["loss_seconds"] = seconds(lambda: found.update(loss=forward.loss(stream)), setting.device)
        remember_memory(found, setting)
    return {**found, "layers": layers, "flops": flops(forward.config, forward.seq_len)}


def remember_memory(found: dict[str, Any], setting: Setting) -> None:
    """The most that any part of the pass has taken."""
    if setting.device.type == "cuda":
        found["memory"] = max(found["memory"], torch.cuda.max_memory_allocated(setting.device))


def kept(setting: Setting, found: dict[str, Any]) -> None:
    """Remove what was put away of a pass whose result is written."""
    if len(found["seconds"]) == found["layers"]:
        for name in ("progress.json", "stream.safetensors"):
            (folder_of(setting) / name).unlink(missing_ok=True)


def figures(found: dict[str, Any]) -> list[Figure]:
    """Time, speed and memory of the whole pass."""
    done, layers = len(found["seconds"]), found["layers"]
    if done < layers:
        return [Figure(f"forward over {found['S']} tokens", f"{done} of {layers} layers; run it again to go on")]
    total = sum(found["seconds"]) + found["loss_seconds"]
    room = f", {found['memory'] / 2**30:.1f} GiB" if found["memory"] else ""
    told = f"**{total:.0f} s**: {found['flops'] / total / 1e12:.3g} TFLOP/s{room}; loss {found['loss']:.2f}"
    return [Figure(f"forward of {layers} layers and the loss over {found['S']} tokens", told)]


PARTS = (Part("million", "the 7B shape forward over 1,048,576 tokens, some layers a command", measure, figures, kept),)
