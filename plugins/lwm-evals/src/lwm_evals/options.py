"""Options of the suite ``needle``: the only source of its defaults."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

Depth = Annotated[float, Field(ge=0.0, le=1.0)]

NEW_TOKENS_A_NEEDLE = 32
"""Room for ``City: 1234567, `` even where every character is a token."""


class NeedleOptions(BaseModel):
    """How the needle suite asks. Lengths are in tokens of the run's own tokenizer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lengths: tuple[PositiveInt, ...] | None = Field(
        default=None, min_length=1,
        description="context lengths, prompt and answer together; default: every stage's length and the start's",
    )  # fmt: skip
    depths: PositiveInt | tuple[Depth, ...] = Field(
        default=10, description="where needles lie, 0 the start and 1 the end: so many evenly spaced, or a list"
    )
    samples: PositiveInt = Field(default=20, description="samples a length at each stage, spread over the depths")
    samples_longest: PositiveInt = Field(
        default=100, description="samples of the longest length where samples_longest_at says so"
    )
    samples_longest_at: Literal["ends", "all"] = Field(
        default="ends", description="ends: at the first and the last stage (base and final); all: at every stage"
    )
    needles: PositiveInt = Field(default=1, description="N: needles hidden in each text")
    retrieve: PositiveInt = Field(default=1, description="R: how many of them are asked for")
    batch_tokens: PositiveInt = Field(default=32_768, description="tokens of the prompts that are generated together")
    max_new_tokens: PositiveInt | None = Field(
        default=None, description=f"tokens the model may answer with; default: {NEW_TOKENS_A_NEEDLE} a needle asked for"
    )
    haystack: str | None = Field(
        default=None, description="text file to hide needles in; default: what the data source holds out"
    )
    stop_at_eos: bool = Field(default=True, description="end an answer at the tokenizer's eos, where it has one")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.retrieve > self.needles:
            raise ValueError(f"retrieve is {self.retrieve} but only {self.needles} needle(s) are hidden; lower it")
        if isinstance(self.depths, tuple) and not self.depths:
            raise ValueError("depths is empty; expected at least one depth from 0 to 1")
        return self

    @property
    def depth_list(self) -> tuple[float, ...]:
        """The depths, each in [0, 1]; a single one lies in the middle."""
        if isinstance(self.depths, tuple):
            return self.depths
        if self.depths == 1:
            return (0.5,)
        return tuple(round(float(depth), 4) for depth in np.linspace(0.0, 1.0, self.depths))

    @property
    def new_tokens(self) -> int:
        """Tokens kept free for the answer."""
        return self.max_new_tokens or NEW_TOKENS_A_NEEDLE * self.retrieve
