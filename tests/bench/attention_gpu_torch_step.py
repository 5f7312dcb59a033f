"""Part of ``attention-gpu-torch``: a training step of the ``llama3-8b`` shape, as many layers as the GPU has room for.

The step is the trainer's own, with its optimizer, on one device.

Shapes: B batch, S sequence; B is 1.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from bench_torch_gpu import Figure, Part, Setting, seconds

from lwm_core.batch import PackedBatch, TokenSequence, pack_rows
from lwm_core.errors import LwmError
from lwm_core.metrics import mfu
from lwm_core.model import ModelConfig, canonical_shapes, preset
from lwm_core.protocols import OptimizerSpec, Stage, TrainerContext
from lwm_core.rope import RopeSpec
from lwm_core.vocab import Vocabulary
from lwm_torch_ring.attention.backend import factory
from lwm_torch_ring.attention.options import AttentionOptions
from lwm_torch_ring.devices import peak_flops
from lwm_torch_ring.train.options import TrainerOptions
from lwm_torch_ring.train.trainer import TorchTrainer

SEQ_LEN, VOCABULARY = 32_768, 128_256
BYTES = 4 + 4 + 8 + 2
"""Of a parameter: float32 value and gradient, two moments, and the bfloat16 copy that is multiplied with."""

WORKING_SHARE = 0.2
"""Of the memory, what is left to activations and slices."""

AIM = 0.50


def shape_that_fits(setting: Setting) -> tuple[ModelConfig, int]:
    """The model and its length."""
    if setting.small:
        return preset("debug", Vocabulary(256), num_layers=2), 256
    config = preset("llama3-8b", Vocabulary(VOCABULARY))
    free, _ = torch.cuda.mem_get_info(setting.device)
    one = config_bytes(replace(config, num_layers=2)) - config_bytes(replace(config, num_layers=1))
    rest = config_bytes(replace(config, num_layers=1)) - one
    layers = int((free * (1 - WORKING_SHARE) - rest) / one)
    if layers < 1:
        raise LwmError(f"attention-gpu-torch: {free / 1e9:.0f} GB are free: not one layer of llama3-8b fits")
    return replace(config, num_layers=min(layers, config.num_layers)), SEQ_LEN


def config_bytes(config: ModelConfig) -> int:
    """Of parameters and all that is kept for each."""
    return BYTES * sum(int(np.prod(shape)) for shape in canonical_shapes(config).values())


def measure(setting: Setting) -> dict[str, Any]:
    """Seconds of each step after one that is not measured."""
    config, seq_len = shape_that_fits(setting)
    options = TrainerOptions(
        device=setting.device.type,
        compute_dtype=setting.dtype_name,
        loss_chunk=2048,
        token_chunk=None if setting.small else 8192,
    )
    context = TrainerContext(config, factory, AttentionOptions(kernel=setting.kernel), OptimizerSpec(), {}, seed=0)
    trainer = TorchTrainer(options, context)
    trainer.begin_stage(Stage("s", seq_len, RopeSpec(5e5), 10 * seq_len, seq_len, 1e-4, 1e-4, mesh="1,1,1,1"))
    batch = one_document(config, seq_len)
    losses: list[float] = []
    times = [
        seconds(lambda number=number: losses.append(trainer.step(batch, number)["loss"]), setting.device)
        for number in range(min(setting.rounds, 5) + 1)
    ][1:]
    speed = seq_len / statistics.median(times)
    peak = peak_flops(setting.device, 1, None)
    on_gpu = setting.device.type == "cuda"
    return {
        "case": {"layers": config.num_layers, "parameters": config.parameter_count, "S": seq_len},
        "notes": list(trainer.choices()), "seconds": times, "losses": losses, "tokens_per_second": speed,
        "mfu": mfu(config, seq_len, speed, peak), "peak_flops": peak,
        "memory": torch.cuda.max_memory_allocated(setting.device) if on_gpu else None,
    }  # fmt: skip


def one_document(config: ModelConfig, seq_len: int) -> PackedBatch:
    """A row of random tokens, one document."""
    ids = np.random.default_rng(0).integers(0, config.vocabulary.text_size, seq_len)
    return pack_rows([[TokenSequence(ids, np.ones(seq_len, np.float32))]], seq_len)


def figures(found: dict[str, Any]) -> list[Figure]:
    """MFU, and how fast."""
    case, memory = found["case"], found["memory"]
    room = "" if memory is None else f", {memory / 2**30:.1f} GiB"
    what = f"MFU, {case['layers']} layers ({case['parameters'] / 1e9:.2f}B) at {case['S']} tokens"
    share = "unknown" if found["mfu"] is None else f"{100 * found['mfu']:.1f}%"
    return [Figure(what, f"**{share}**: {found['tokens_per_second']:.0f} tokens/s{room}", f"{100 * AIM:.0f}%")]


PARTS = (Part("step", "a training step of the llama3-8b shape at 32K tokens", measure, figures),)
