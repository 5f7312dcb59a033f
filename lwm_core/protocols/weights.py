"""What a weights plugin gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class WeightsBundle:
    """A model in a folder: what a ``lwm.weights.v1`` factory gives when called.

    The folder holds ``model.safetensors`` (canonical names), ``config.json`` (see ``lwm_core.weights``) and, where the
    text is not bytes, ``tokenizer.json``.
    """

    name: str
    folder: Path
