"""The model every trainer builds: a decoder-only Llama, its presets, and its canonical parameters.

Canonical names and shapes are Hugging Face Llama's (linear weights are ``[out, in]``), one unstacked array a layer, so
that any trainer's parameters are any other's and every export is a plain Llama.

Shapes: E hidden size, F feed-forward size, H query heads, K key-value heads, D head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from lwm_core.errors import ShapeError, UsageError
from lwm_core.vocab import Vocabulary


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder-only Llama: RMSNorm, RoPE in float32, SwiGLU, MHA or GQA, no biases.

    Raises:
        ShapeError: the heads do not divide, or the head dim is odd.
    """

    vocabulary: Vocabulary
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tie_embeddings: bool = False
    rms_norm_eps: float = 1e-5
    init_std: float = 0.02
    qkv_bias: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ShapeError(
                f"model: num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}; "
                "each key-value head serves a whole group of query heads"
            )
        if self.head_dim % 2:
            raise ShapeError(f"model: head_dim = {self.head_dim} is odd; RoPE rotates pairs")

    @property
    def parameter_count(self) -> int:
        """Number of parameters, tied tables counted once."""
        total = 0
        for shape in canonical_shapes(self).values():
            size = 1
            for dim in shape:
                size *= dim
            total += size
        return total

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values, for run.json and a checkpoint's card."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The inverse of :meth:`to_dict`."""
        return cls(**{**values, "vocabulary": Vocabulary(**values["vocabulary"])})


def _lwm(hidden: int, ffn: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "debug": _lwm(256, 256, 2, 2),
    "tiny": {**_lwm(256, 688, 4, 4), "num_kv_heads": 2, "tie_embeddings": True},
    "200m": _lwm(1024, 2048, 14, 8),
    "1b": _lwm(2048, 5504, 22, 16),
    "3b": _lwm(3200, 8640, 26, 32),
    "7b": _lwm(4096, 11008, 32, 32),
    "13b": _lwm(5120, 13824, 40, 40),
    "llama3-8b": {**_lwm(4096, 14336, 32, 32), "num_kv_heads": 8},
    "qwen2.5-7b": {**_lwm(3584, 18944, 28, 28), "num_kv_heads": 4, "rms_norm_eps": 1e-6, "qkv_bias": True},
}
"""LWM's own sizes (arXiv 2402.08268's code, Llama shapes), the laptop's ``tiny``, and two published GQA shapes."""


def preset(name: str, vocabulary: Vocabulary, **changes: Any) -> ModelConfig:
    """The preset ``name`` with the changes that are not None.

    Raises:
        UsageError: the preset is unknown.
        ShapeError: the changed shape does not fit together.
    """
    if name not in PRESETS:
        raise UsageError(f"model.preset {name!r} is unknown; expected one of {', '.join(PRESETS)}")
    given = {key: value for key, value in changes.items() if value is not None}
    values = {**PRESETS[name], **given}
    if ("hidden_size" in given or "num_heads" in given) and "head_dim" not in given:
        if values["hidden_size"] % values["num_heads"]:
            raise ShapeError(
                f"model: hidden_size = {values['hidden_size']} is not a multiple of "
                f"num_heads = {values['num_heads']}; set head_dim"
            )
        values["head_dim"] = values["hidden_size"] // values["num_heads"]
    if "num_heads" in given and "num_kv_heads" not in given and values["num_heads"] % values["num_kv_heads"]:
        values["num_kv_heads"] = values["num_heads"]
    return ModelConfig(vocabulary=vocabulary, **values)


def canonical_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name → shape, in the order of a forward pass."""
    return dict(_named_shapes(config))


def _named_shapes(c: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    query, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    yield "model.embed_tokens.weight", (c.vocabulary.size, c.hidden_size)
    for i in range(c.num_layers):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (c.hidden_size,)
        for name, rows in (("q", query), ("k", kv), ("v", kv)):
            yield f"{layer}.self_attn.{name}_proj.weight", (rows, c.hidden_size)
            if c.qkv_bias:
                yield f"{layer}.self_attn.{name}_proj.bias", (rows,)
        yield f"{layer}.self_attn.o_proj.weight", (c.hidden_size, query)
        yield f"{layer}.post_attention_layernorm.weight", (c.hidden_size,)
        yield f"{layer}.mlp.gate_proj.weight", (c.intermediate_size, c.hidden_size)
        yield f"{layer}.mlp.up_proj.weight", (c.intermediate_size, c.hidden_size)
        yield f"{layer}.mlp.down_proj.weight", (c.hidden_size, c.intermediate_size)
    yield "model.norm.weight", (c.hidden_size,)
    if not c.tie_embeddings:
        yield "lm_head.weight", (c.vocabulary.size, c.hidden_size)


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Floating-point operations to train on one token: ``6·N + 6·L·H·D·S``, causal attention counted half.

    N is the number of matrix parameters a token meets: the layers' matrices, and the output head's rows for text (a
    target meets the slice of its own modality only); an embedding lookup is not counted. The attention term is
    ``12·L·H·D·S`` (PaLM, arXiv 2204.02311, appendix B) halved for the causal mask. Recomputation is not counted: this
    is the numerator of MFU.
    """
    layers = sum(s[0] * s[1] for name, s in canonical_shapes(config).items() if ".layers." in name and len(s) == 2)
    matrices = layers + config.vocabulary.text_size * config.hidden_size
    return 6.0 * matrices + 6.0 * config.num_layers * config.num_heads * config.head_dim * seq_len
