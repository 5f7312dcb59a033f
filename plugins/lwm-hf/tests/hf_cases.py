"""What the tests of interchange share: small models, and files as LWM's JAX code writes them.

Shapes: L layers, E hidden size, F feed-forward size, H query heads, K key-value heads, D head dim, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lwm_core.model import ModelConfig, canonical_shapes, preset
from lwm_core.vocab import Vocabulary

msgpack = pytest.importorskip("msgpack")
pytest.importorskip("flax")
from flax import serialization  # noqa: E402 - not before it is known to be there

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2}
THETA = ("--theta", "5e7", "--seq-len", "4096", "--heads", "4")


def model(vision: int = 0, **changes: Any) -> ModelConfig:
    return preset("debug", Vocabulary(70, vision), **{**SHAPE, **changes})


def arrays(config: ModelConfig) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in canonical_shapes(config).items()}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """A canonical query or key weight as LWM has it: row 2i + j of a head was row i + j·D/2."""
    found = np.empty_like(weight)
    dim = weight.shape[0] // heads
    for head in range(heads):
        for i in range(dim // 2):
            for j in range(2):
                found[head * dim + 2 * i + j] = weight[head * dim + i + j * dim // 2]
    return found


def as_lwm(config: ModelConfig, values: dict[str, np.ndarray]) -> dict[tuple[str, ...], np.ndarray]:
    """The model under LWM's keys, layers stacked and kernels ``[in, out]``."""
    text, h = config.vocabulary.text_size, ("params", "transformer", "h", "scan_decoder")

    def stacked(name: str, heads: int = 0) -> np.ndarray:
        rows = [values[f"model.layers.{i}.{name}.weight"] for i in range(config.num_layers)]
        return np.stack([(interleaved(w, heads) if heads else w).T for w in rows])

    found = {
        ("params", "transformer", "wte", "embedding"): values["model.embed_tokens.weight"][:text],
        (*h, "attention", "wq", "kernel"): stacked("self_attn.q_proj", config.num_heads),
        (*h, "attention", "wk", "kernel"): stacked("self_attn.k_proj", config.num_kv_heads),
        (*h, "attention", "wv", "kernel"): stacked("self_attn.v_proj"),
        (*h, "attention", "wo", "kernel"): stacked("self_attn.o_proj"),
        (*h, "feed_forward", "w1", "kernel"): stacked("mlp.gate_proj"),
        (*h, "feed_forward", "w2", "kernel"): stacked("mlp.down_proj"),
        (*h, "feed_forward", "w3", "kernel"): stacked("mlp.up_proj"),
        (*h, "attention_norm", "kernel"): stacked("input_layernorm"),
        (*h, "ffn_norm", "kernel"): stacked("post_attention_layernorm"),
        ("params", "transformer", "ln_f", "kernel"): values["model.norm.weight"],
        ("params", "lm_head", "kernel"): values["lm_head.weight"][:text].T,
    }
    if config.vocabulary.vision_size:
        found["params", "transformer", "vte", "embedding"] = values["model.embed_tokens.weight"][text:]
        found["params", "vision_head", "kernel"] = values["lm_head.weight"][text:].T
    return found


def write_stream(path: Path, rows: dict[tuple[str, ...], Any]) -> None:
    """As LWM's streaming checkpointer writes."""
    packer = msgpack.Packer()
    with path.open("wb") as file:
        for key, value in rows.items():
            file.write(packer.pack((key, serialization.to_bytes(value))))
