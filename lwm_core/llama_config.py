"""``config.json`` of a model folder: a Hugging Face Llama configuration that ``transformers`` reads as it stands.

It also holds a table ``lwm``: how the one vocabulary splits, the RoPE's factors, and the length that was trained. A
configuration without that table is read as a text-only model's, its RoPE from Hugging Face's own words.

Shapes: D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lwm_core.errors import CheckpointError
from lwm_core.model import ModelConfig
from lwm_core.rope import RopeSpec
from lwm_core.rope_scalings import SCALINGS, linear, llama3, yarn
from lwm_core.vocab import Vocabulary

KINDS = ("llama", "qwen2")
"""``model_type`` of networks that are this project's Llama."""

NAMED = ("linear", "llama3", "yarn")
"""Scalings that have the same name and formula there; NTK's is a theta, and leaves as that."""


def to_huggingface(model: ModelConfig, rope: RopeSpec, seq_len: int, dtype: str) -> dict[str, Any]:
    """The configuration of a model that was trained with rows of ``seq_len`` tokens."""
    scaling = _scaling_words(rope, model.head_dim, seq_len)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.rms_norm_eps,
        "initializer_range": model.init_std,
        "rope_theta": rope.theta,
        **({} if scaling is None else {"rope_scaling": scaling}),
        "max_position_embeddings": seq_len,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": model.qkv_bias,
        "mlp_bias": False,
        "vocab_size": model.vocabulary.size,
        "torch_dtype": dtype,
        "lwm": {
            "text_size": model.vocabulary.text_size,
            "vision_size": model.vocabulary.vision_size,
            "vision_codes": model.vocabulary.vision_codes,
            "rope_factors": None if rope.factors is None else list(rope.factors),
            "rope_attention_factor": rope.attention_factor,
            "seq_len": seq_len,
        },
    }


def _scaling_words(rope: RopeSpec, head_dim: int, seq_len: int) -> dict[str, Any] | None:
    """The scaling in Hugging Face's words: its own name where it has one there, else ``longrope``.

    ``longrope`` divides each frequency by a number of its own. Its two lists are for rows up to and beyond
    ``original_max_position_embeddings``; they are the same here.
    """
    if rope.factors is None and rope.attention_factor == 1.0:
        return None
    if rope.scaling is not None and rope.scaling.name in NAMED:
        parameters = dict(rope.scaling.parameters)
        if SCALINGS[rope.scaling.name](rope.theta, head_dim, **parameters) == rope:  # else they are of other factors
            original = {"original_max_position_embeddings": parameters.pop("original", None)}
            words = {"rope_type": rope.scaling.name, **parameters, **original}
            return {name: value for name, value in words.items() if value is not None}
    divisors = [1.0 / factor for factor in rope.factors or (1.0,) * (head_dim // 2)]
    return {
        "rope_type": "longrope", "short_factor": divisors, "long_factor": divisors, "factor": 1.0,
        "original_max_position_embeddings": seq_len, "attention_factor": rope.attention_factor,
    }  # fmt: skip


def from_huggingface(path: Path, values: Mapping[str, Any]) -> tuple[ModelConfig, RopeSpec, int]:
    """The shape, the RoPE and the trained length that ``values`` of the file ``path`` describe.

    Raises:
        CheckpointError: it is no Llama, or its RoPE is none that is known.
        KeyError, TypeError, ValueError: a value is missing or wrong.
    """
    kind = values.get("model_type", "llama")
    if kind not in KINDS:
        raise CheckpointError(f"{path}: model_type is {kind!r}; expected 'llama'")
    own = values.get("lwm") or {}
    heads = values["num_attention_heads"]
    vocabulary = Vocabulary(
        text_size=own.get("text_size", values["vocab_size"]),
        vision_size=own.get("vision_size", 0),
        vision_codes=own.get("vision_codes", 8192),
    )
    if vocabulary.size != values["vocab_size"]:
        raise CheckpointError(
            f"{path}: vocab_size is {values['vocab_size']}, but lwm.text_size + lwm.vision_size is {vocabulary.size}"
        )
    model = ModelConfig(
        vocabulary=vocabulary,
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or values["hidden_size"] // heads,
        tie_embeddings=values.get("tie_word_embeddings", False),
        rms_norm_eps=values["rms_norm_eps"],
        init_std=values.get("initializer_range", 0.02),
        qkv_bias=values.get("attention_bias", kind == "qwen2"),
    )
    rope = _own_rope(path, values, own, model.head_dim) if own else _rope(path, values, model.head_dim)
    return model, rope, int(own.get("seq_len", values["max_position_embeddings"]))


def _theta(values: Mapping[str, Any]) -> float:
    """The base, from where Hugging Face has kept it: ``rope_parameters`` since transformers 5."""
    return float((values.get("rope_parameters") or values).get("rope_theta", 10_000.0))


def _own_rope(path: Path, values: Mapping[str, Any], own: Mapping[str, Any], head_dim: int) -> RopeSpec:
    """From the factors themselves, with the words that another may have for them."""
    factors = own.get("rope_factors")
    words = values.get("rope_parameters") or values.get("rope_scaling") or {}
    told = None if words.get("rope_type") not in NAMED else _rope(path, values, head_dim).scaling
    factor = own.get("rope_attention_factor", 1.0)
    return RopeSpec(_theta(values), None if factors is None else tuple(factors), factor, told)


def _rope(path: Path, values: Mapping[str, Any], head_dim: int) -> RopeSpec:
    """The RoPE in Hugging Face's words: ``rope_parameters``, or ``rope_theta`` with ``rope_scaling``."""
    theta = _theta(values)
    words = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = words.get("rope_type", words.get("type", "default"))
    original = words.get("original_max_position_embeddings") or values["max_position_embeddings"]
    if kind == "default":
        return RopeSpec(theta)
    if kind == "linear":
        return linear(theta, head_dim, factor=words["factor"])
    if kind == "llama3":
        ends = {name: words[name] for name in ("low_freq_factor", "high_freq_factor")}
        return llama3(theta, head_dim, factor=words["factor"], original=original, **ends)
    if kind == "yarn" and not words.get("mscale") and not words.get("mscale_all_dim"):
        given = ("beta_fast", "beta_slow", "truncate", "attention_factor")
        options = {name: words[name] for name in given if words.get(name) is not None}
        return yarn(theta, head_dim, factor=words["factor"], original=original, **options)
    raise CheckpointError(
        f"{path}: RoPE of type {kind!r} ({', '.join(words)}) is not read; expected default, linear, llama3 or yarn"
    )
