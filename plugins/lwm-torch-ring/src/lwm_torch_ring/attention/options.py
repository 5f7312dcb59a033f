"""Options of the attention ``torch-ring``. Imports pydantic alone."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class AttentionOptions(BaseModel):
    """How attention runs over the ``sp`` axis of the mesh."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strategy: Literal["ring", "allgather", "ulysses", "usp", "auto"] = Field(
        "ring", description="how keys and values reach the queries; auto: the cheapest by heads, mesh and devices"
    )
    layout: Literal["contiguous", "zigzag", "striped"] = Field(
        "zigzag", description="how tokens are dealt to ranks; zigzag evens out causal work; ulysses has one rank"
    )
    inner: int | None = Field(
        None, gt=0, description="usp: neighbours that exchange heads; sp's largest divisor up to its root by default"
    )
    gather_heads: int | None = Field(
        None, gt=0, description="allgather: key-value heads gathered at a time, the next while these are computed; all"
    )
    kernel: Literal["auto", "cpu-flash", "flash-attn-3", "cudnn", "cuda-flash", "math"] = Field(
        "auto", description="what computes a block; auto: the first of these that can on the device, and says so"
    )
    chunk: int = Field(
        512, gt=0, description="queries and keys of a block that a mask cuts through, in tokens; math: of every block"
    )

    @model_validator(mode="after")
    def _given_to_their_strategy(self) -> AttentionOptions:
        for name, owner in (("inner", "usp"), ("gather_heads", "allgather")):
            if getattr(self, name) is not None and self.strategy != owner:
                raise ValueError(f"{name} belongs to strategy {owner!r}, but strategy is {self.strategy!r}; remove it")
        return self
