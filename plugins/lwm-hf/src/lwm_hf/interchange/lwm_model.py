"""A model of LWM's JAX release by canonical names: layers taken apart, kernels turned, rotary pairs reordered.

LWM rotates interleaved pairs (2i, 2i+1) of a head, as Meta's Llama does; canonical weights rotate halves (i, i + D/2),
as Hugging Face's do. Its vision model has tables of its own beside the text's; here both are rows of one vocabulary.

Shapes: L layers, E hidden size, F feed-forward size, H query heads, K key-value heads, D head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lwm_core.errors import CheckpointError
from lwm_core.model import ModelConfig
from lwm_core.vocab import Vocabulary
from lwm_hf.interchange.stream_file import StoredArray

Arrays = Mapping[tuple[str, ...], StoredArray]
BLOCK = ("transformer", "h", "scan_decoder")
KERNELS = {
    "self_attn.q_proj": ("attention", "wq"),
    "self_attn.k_proj": ("attention", "wk"),
    "self_attn.v_proj": ("attention", "wv"),
    "self_attn.o_proj": ("attention", "wo"),
    "mlp.gate_proj": ("feed_forward", "w1"),
    "mlp.down_proj": ("feed_forward", "w2"),
    "mlp.up_proj": ("feed_forward", "w3"),
}
NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
TABLES = {
    "model.embed_tokens.weight": (("transformer", "wte", "embedding"), ("transformer", "vte", "embedding")),
    "lm_head.weight": (("lm_head", "kernel"), ("vision_head", "kernel")),
}


def as_pairs(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """A canonical ``[H·D, E]``, whose halves rotate, seen as ``[H, D/2, 2, E]`` in the order of interleaved pairs.

    Row i + j·D/2 of a head is its pair i's member j.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2)


def model_config(path: Path, arrays: Arrays, heads: int, rms_norm_eps: float) -> ModelConfig:
    """The shape, from those of the arrays; heads and epsilon are in no array.

    Raises:
        CheckpointError: an array is missing, or is not of the shape that the others make it.
    """
    embedding = _array(path, arrays, TABLES["model.embed_tokens.weight"][0])
    gate = _kernel(path, arrays, "mlp.gate_proj")
    query, key = (_kernel(path, arrays, f"self_attn.{name}_proj") for name in "qk")
    text, hidden = embedding.shape
    layers, _, feed_forward = gate.shape
    if query.shape[2] % heads or key.shape[2] % (query.shape[2] // heads):
        raise CheckpointError(
            f"{path}: queries {query.shape[2]} and keys {key.shape[2]} wide do not divide into {heads} heads; "
            "set --heads"
        )
    head_dim = query.shape[2] // heads
    vision = arrays.get(TABLES["model.embed_tokens.weight"][1])
    return ModelConfig(
        vocabulary=Vocabulary(text, 0 if vision is None else vision.shape[0]),
        hidden_size=hidden, intermediate_size=feed_forward, num_layers=layers, num_heads=heads,
        num_kv_heads=key.shape[2] // head_dim, head_dim=head_dim, rms_norm_eps=rms_norm_eps,
    )  # fmt: skip


def parameters(path: Path, arrays: Arrays, model: ModelConfig) -> Iterator[tuple[str, NDArray[Any]]]:
    """(canonical name, array), one at a time; of the file no more than that and a few MiB is in memory.

    Raises:
        CheckpointError: an array is missing.
    """
    for name, parts in TABLES.items():
        found = [_array(path, arrays, part) for part in parts[: 1 + (model.vocabulary.vision_size > 0)]]
        yield name, _table(path, found, turned=name == "lm_head.weight")
    yield "model.norm.weight", _array(path, arrays, ("transformer", "ln_f", "kernel")).whole()
    heads = {"self_attn.q_proj": model.num_heads, "self_attn.k_proj": model.num_kv_heads}
    for layer in range(model.num_layers):
        for name, theirs in NORMS.items():
            norm = _array(path, arrays, (*BLOCK, theirs, "kernel")).rows(layer, layer + 1)[0]
            yield f"model.layers.{layer}.{name}.weight", norm
        for name in KERNELS:
            kernel = _kernel(path, arrays, name).layer(layer)
            yield f"model.layers.{layer}.{name}.weight", _weight(kernel, heads.get(name))


def _table(path: Path, found: Sequence[StoredArray], *, turned: bool) -> NDArray[Any]:
    """``[V, E]`` of the text's ids and then, if it has some, of the vision's; ``turned``: stored as ``[E, V]``."""
    shapes = [one.shape[::-1] if turned else one.shape for one in found]
    sizes, hidden = [shape[0] for shape in shapes], shapes[0][-1]
    if any(shape[1:] != (hidden,) for shape in shapes):
        raise CheckpointError(f"{path}: the tables of text and vision are of shapes {shapes}; expected as many columns")
    table = np.empty((sum(sizes), hidden), np.result_type(*(one.dtype for one in found)))
    first = 0
    for one, size in zip(found, sizes, strict=True):
        part = table[first : first + size]
        one.read_into(part.T if turned else part)
        first += size
    return table


def _weight(kernel: StoredArray, heads: int | None) -> NDArray[Any]:
    """``[out, in]`` of a kernel ``[in, out]``, which rotates interleaved pairs where heads are given."""
    weight = np.empty(kernel.shape[::-1], kernel.dtype)
    kernel.read_into(weight.T if heads is None else np.moveaxis(as_pairs(weight, heads), -1, 0))
    return weight


def _kernel(path: Path, arrays: Arrays, name: str) -> StoredArray:
    return _array(path, arrays, (*BLOCK, *KERNELS[name], "kernel"))


def _array(path: Path, arrays: Arrays, key: tuple[str, ...]) -> StoredArray:
    if key not in arrays:
        raise CheckpointError(f"{path}: there is no {'/'.join(key)}; expected a model of LWM's, layers stacked")
    return arrays[key]
