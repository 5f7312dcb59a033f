"""Options of the stand-ins."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainerOptions(_Options):
    """What the trainer can be made to do."""

    devices: int = Field(1, gt=0, description="devices it pretends to have")
    step_seconds: float = Field(0.0, ge=0, description="sleep of each step")
    token_seconds: float = Field(0.0, ge=0, description="sleep before each token that is written")
    save_seconds: float = Field(0.0, ge=0, description="time until a save has reached the disk")
    nan_at: int | None = Field(None, description="the optimizer step whose loss is not a number")
    full_at: int | None = Field(None, description="the save, from 1, that finds the disk full")
    full_rank: int = Field(0, ge=0, description="the rank that finds it full")
    peak_flops: float | None = Field(None, description="peak of all devices, FLOP/s")


class AttentionOptions(_Options):
    """How sequences are dealt."""

    layout: Literal["contiguous", "zigzag", "striped"] = "zigzag"


class PatchesOptions(_Options):
    """How fine the brightness is."""

    codes: int = Field(256, gt=0, le=256)


class TallyOptions(_Options):
    """How much is scored."""

    samples: int = Field(4, gt=0)
    sample_seconds: float = Field(0.0, ge=0)


class GlanceOptions(_Options):
    """Whether it is content with its setup."""

    refuse: str = Field("", description="what it finds wrong before the first step")


class CodedOptions(_Options):
    """Who made the codes that it says it has."""

    checksum: str = Field("0" * 64, description="of the weights; the stand-in encoder's own by default")


class DoublingOptions(_Options):
    """How often the length doubles."""

    first: int = Field(32, gt=0)
    stages: int = Field(2, gt=0)
