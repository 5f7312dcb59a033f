"""Options of the encoder ``vqgan``."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

FRAMEWORKS = ("jax", "torch")
_NEEDS = {"jax": ("jax", "flax"), "torch": ("torch",)}


class VqganOptions(BaseModel):
    """Which VQGAN, in which framework, and how many frames at once."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: str = Field(
        "embedded", min_length=1,
        description="'embedded', or the path of a folder (this package's or diffusers' VQModel) or of LWM's file",
    )  # fmt: skip
    framework: Literal["auto", "jax", "torch"] = Field(
        "auto", description="auto: the trainer's; without a trainer the first installed of jax and torch"
    )
    batch: int = Field(16, gt=0, description="frames at once; memory grows with it")


def installed(framework: str) -> bool:
    """Whether all that the VQGAN needs of a framework can be imported."""
    return all(find_spec(module) is not None for module in _NEEDS[framework])


def no_framework() -> list[str]:
    """The probe: why the plugin cannot be used on this machine."""
    if any(installed(framework) for framework in FRAMEWORKS):
        return []
    return ["needs jax with flax, or torch: pip install lwm-vqgan[jax] or lwm-vqgan[torch]"]
