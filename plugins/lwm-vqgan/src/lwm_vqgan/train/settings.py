"""What ``lwm vqgan train`` was asked for: the shape of a folder, and ``-s KEY=VALUE`` laid on it."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lwm_core.errors import ConfigError, UsageError
from lwm_vqgan.model.config import VqganConfig
from lwm_vqgan.train.options import TrainOptions
from lwm_vqgan.weights.folder import EMBEDDED, read_config
from lwm_vqgan.weights.load import EMBEDDED_NAME

MODEL_PREFIX = "model."
_Model = TypeVar("_Model", bound=BaseModel)


def settings(like: str, overrides: Sequence[str]) -> tuple[VqganConfig, TrainOptions]:
    """The shape and the training that were asked for.

    Args:
        like: ``"embedded"``, or a folder whose ``config.json`` gives the shape.
        overrides: ``KEY=VALUE`` with a TOML value; keys that begin with ``model.`` are the shape's.

    Raises:
        UsageError: an override is not of that form.
        ConfigError: with a line for every value that does not fit.
    """
    shape = read_config(EMBEDDED if like == EMBEDDED_NAME else Path(like)).model_dump()
    training: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"-s {text}: expected KEY=VALUE")
        target, key = (shape, key[len(MODEL_PREFIX) :]) if key.startswith(MODEL_PREFIX) else (training, key)
        try:
            target[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            raise UsageError(f"-s {text}: {value!r} is not a TOML value") from None
    return _checked(VqganConfig, shape, MODEL_PREFIX), _checked(TrainOptions, training, "")


def _checked(model: type[_Model], values: dict[str, Any], prefix: str) -> _Model:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        known = ", ".join(model.model_fields)
        raise ConfigError(
            [
                f"-s {prefix}{'.'.join(map(str, e['loc']))}: {e['msg']}"
                + (f"; expected one of {known}" if e["type"] == "extra_forbidden" else "")
                for e in error.errors()
            ]
        ) from None
