"""Options of the attention ``jax-ring``. Imports pydantic alone."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class AttentionOptions(BaseModel):
    """How attention runs over the ``sp`` axis of the mesh."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strategy: Literal["ring"] = Field("ring", description="how keys and values reach the queries")
    layout: Literal["contiguous", "zigzag", "striped"] = Field(
        "zigzag", description="how tokens are dealt to ranks; zigzag evens out causal work"
    )
    kernel: Literal["xla"] = Field("xla", description="what computes a block between two transfers")
    query_chunk: int = Field(256, gt=0, description="queries computed at a time, in tokens")
    key_chunk: int = Field(256, gt=0, description="keys computed at a time, in tokens")
