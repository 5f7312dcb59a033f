"""Our folder of a VQGAN: ``config.json`` and ``model.safetensors`` with canonical names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from lwm_core.errors import CheckpointError
from lwm_vqgan.model.config import VqganConfig
from lwm_vqgan.model.parameters import parameter_shapes

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
MODEL_TYPE = "lwm-vqgan"
EMBEDDED = Path(__file__).parent.parent / "embedded"
"""The folder that ships in this package."""

Dtype = Literal["float32", "float16", "bfloat16"]
_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip
_MOST_NAMED = 3  # parameters named in one message


@dataclass(frozen=True)
class VqganWeights:
    """A VQGAN's configuration and its parameters: canonical name → array of the canonical shape.

    Raises:
        CheckpointError: a parameter is missing, unknown or of another shape; the message names ``source``.
    """

    config: VqganConfig
    parameters: Mapping[str, NDArray[Any]]
    source: str

    def __post_init__(self) -> None:
        shapes = parameter_shapes(self.config)
        wrong = [
            f"{name} is {self.parameters[name].shape}, expected {shape}"
            for name, shape in shapes.items()
            if name in self.parameters and self.parameters[name].shape != shape
        ]
        missing = [name for name in shapes if name not in self.parameters]
        unknown = [name for name in self.parameters if name not in shapes]
        told = [
            _listed(what, names)
            for what, names in (("of another shape", wrong), ("missing", missing), ("unknown", unknown))
            if names
        ]
        if told:
            raise CheckpointError(f"{self.source}: parameters do not match the configuration: {'; '.join(told)}")

    def parameter(self, name: str) -> NDArray[np.float32]:
        """One parameter in float32."""
        return np.asarray(self.parameters[name], dtype=np.float32)


def write_folder(folder: Path, weights: VqganWeights, dtype: Dtype = "float32") -> None:
    """Write ``weights`` into ``folder``; each file takes its name when it is whole.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    from safetensors.numpy import save

    target = _DTYPES[dtype]
    arrays = {
        name: np.ascontiguousarray(weights.parameter(name).astype(target)) for name in parameter_shapes(weights.config)
    }
    config = {"model_type": MODEL_TYPE, **weights.config.model_dump(mode="json")}
    files = {
        WEIGHTS_FILE: save(arrays, metadata={"format": "pt"}),
        CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            partial = folder / f"{name}.partial"
            partial.write_bytes(content)
            partial.replace(folder / name)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error.strerror or error}") from None


def read_folder(folder: Path) -> VqganWeights:
    """Read a folder that :func:`write_folder` wrote; arrays stay in the file until they are asked for.

    Raises:
        CheckpointError: a file is missing or damaged, or the two do not match.
    """
    from lwm_core.weights import LazyParameters

    config = read_config(folder)
    if not (folder / WEIGHTS_FILE).is_file():
        raise CheckpointError(f"{folder}: there is no {WEIGHTS_FILE} beside {CONFIG_FILE}")
    return VqganWeights(config, LazyParameters(folder / WEIGHTS_FILE), str(folder))


def read_config(folder: Path) -> VqganConfig:
    """The configuration in ``folder``.

    Raises:
        CheckpointError: it is missing, damaged, or not a VQGAN's.
    """
    values = read_json(folder / CONFIG_FILE)
    if values.pop("model_type", None) != MODEL_TYPE:
        raise CheckpointError(f"{folder / CONFIG_FILE}: not a VQGAN's; expected model_type {MODEL_TYPE!r}")
    return checked_config(values, folder / CONFIG_FILE)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: there is no such file, or it holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: there is no {path.name}; expected a folder of a VQGAN") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}; expected an object")
    return values


def checked_config(values: Mapping[str, Any], path: Path) -> VqganConfig:
    """A configuration of ``values``, with what is wrong told of ``path``.

    Raises:
        CheckpointError: a value is missing, unknown or out of range.
    """
    try:
        return VqganConfig.model_validate(values)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}" for e in error.errors())
        raise CheckpointError(f"{path}: {told}") from None


def _listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f"{len(names)} {what}: {', '.join(names[:_MOST_NAMED])}{more}"
