"""Options of the planted backend."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Options(BaseModel):
    """What the planted backend takes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strategy: Literal["ring"] = Field("ring", description="how keys reach queries")
    layout: Literal["contiguous", "zigzag", "striped"] = Field("contiguous", description="how tokens are dealt")
    fault: str = Field("", description="what it does wrong; empty: nothing")


class Silent(BaseModel):
    """An option that nobody explains."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    speed: int = 1
