"""Reading LWM's own file: the parameter tree of its linen modules, pickled.

Linen numbers the parts of a module by class in the order of their calls, so a residual block has ``GroupNorm_0``,
``Conv_0``, ``GroupNorm_1``, ``Conv_1`` and, where channels change, ``Conv_2``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lwm_core.errors import CheckpointError
from lwm_vqgan.model.config import VqganConfig
from lwm_vqgan.model.parameters import CODEBOOK, parameter_shapes
from lwm_vqgan.weights.folder import VqganWeights
from lwm_vqgan.weights.unpickle import Tree, read_arrays

_RESNET = {
    "norm1": "GroupNorm_0", "conv1": "Conv_0", "norm2": "GroupNorm_1", "conv2": "Conv_1", "conv_shortcut": "Conv_2",
}  # fmt: skip
_STEM = {"conv_in": "Conv_0", "conv_norm_out": "GroupNorm_0", "conv_out": "Conv_1"}
_BLOCKS = {"down_blocks": "DownsamplingBlock", "up_blocks": "UpsamplingBlock"}
_STEPS = {"downsamplers": "Downsample_0", "upsamplers": "Upsample_0"}


def lwm_path(name: str) -> tuple[str, ...]:
    """Where LWM's tree has the parameter of a canonical ``name``."""
    if name == CODEBOOK:
        return ("quantize", "embeddings")
    *modules, last = name.split(".")
    return (*_modules(modules), _leaf(modules[-1], last))


def _modules(modules: list[str]) -> Iterator[str]:
    """``encoder.down_blocks.1.resnets.0.conv1`` → encoder, DownsamplingBlock_1, ResnetBlock_0, Conv_0."""
    parts = iter(modules)
    for part in parts:
        if part in _BLOCKS:
            yield f"{_BLOCKS[part]}_{next(parts)}"
        elif part == "mid_block":
            yield "MidBlock_0"
        elif part == "resnets":
            yield f"ResnetBlock_{next(parts)}"
            yield _RESNET[next(parts)]
        elif part in _STEPS:
            next(parts), next(parts)  # ".0.conv"
            yield from (_STEPS[part], "Conv_0")
        else:
            yield _STEM.get(part, part)


def _leaf(module: str, last: str) -> str:
    if last == "bias":
        return "bias"
    return "scale" if "norm" in module else "kernel"


def read_lwm(path: Path, config: VqganConfig | None = None) -> VqganWeights:
    """The weights in LWM's pickled file, read without running any of it.

    Args:
        config: the model's shape, which the file does not say; LWM's own by default.

    Raises:
        CheckpointError: the file is not such a tree; it may be hostile.
    """
    config = config or VqganConfig()
    flat = dict(_flat(read_arrays(path)))
    if all(parts[0] == "params" for parts in flat):
        flat = {parts[1:]: array for parts, array in flat.items()}
    parameters = {}
    for name in parameter_shapes(config):
        where = lwm_path(name)
        if where not in flat:
            raise CheckpointError(f"{path}: there is no {'/'.join(where)}; expected the tree of LWM's VQGAN")
        array = flat.pop(where)
        parameters[name] = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array
    if flat:
        raise CheckpointError(f"{path}: unknown {'/'.join(next(iter(flat)))}; expected the tree of LWM's VQGAN")
    return VqganWeights(config, parameters, str(path))


def _flat(tree: Tree, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], NDArray[Any]]]:
    for key, value in tree.items():
        if isinstance(value, np.ndarray):
            yield (*above, key), value
        else:
            yield from _flat(value, (*above, key))


def lwm_tree(parameters: Mapping[str, NDArray[Any]]) -> Tree:
    """The tree in which LWM keeps canonical ``parameters``; what :func:`read_lwm` undoes."""
    tree: Tree = {}
    for name, array in parameters.items():
        *modules, last = lwm_path(name)
        inner = tree
        for module in modules:
            inner = inner.setdefault(module, {})
        inner[last] = np.ascontiguousarray(array.transpose(2, 3, 1, 0)) if array.ndim == 4 else array
    return tree
