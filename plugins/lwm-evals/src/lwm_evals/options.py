"""Options of the suites: the only source of their defaults."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from lwm_evals.pictures import Asked

Depth = Annotated[float, Field(ge=0.0, le=1.0)]

NEW_TOKENS_A_NEEDLE = 32
"""Room for ``City: 1234567, `` even where every character is a token."""


class Options(BaseModel):
    """A suite's table: a key that is not known is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class GridOptions(Options):
    """What the needle suites share: a grid of depths × lengths."""

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
    batch_tokens: PositiveInt = Field(default=32_768, description="tokens of the prompts that are generated together")
    stop_at_eos: bool = Field(default=True, description="end an answer at the tokenizer's eos, where it has one")

    @model_validator(mode="after")
    def _some_depth(self) -> Self:
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


class NeedleOptions(GridOptions):
    """How the needle suite asks. Lengths are in tokens of the run's own tokenizer."""

    lengths: tuple[PositiveInt, ...] | None = Field(
        default=None, min_length=1,
        description="context lengths, prompt and answer together; default: every stage's length and the start's",
    )  # fmt: skip
    needles: PositiveInt = Field(default=1, description="N: needles hidden in each text")
    retrieve: PositiveInt = Field(default=1, description="R: how many of them are asked for")
    max_new_tokens: PositiveInt | None = Field(
        default=None, description=f"tokens the model may answer with; default: {NEW_TOKENS_A_NEEDLE} a needle asked for"
    )
    haystack: str | None = Field(
        default=None, description="text file to hide needles in; default: what the data source holds out"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.retrieve > self.needles:
            raise ValueError(f"retrieve is {self.retrieve} but only {self.needles} needle(s) are hidden; lower it")
        return self

    @property
    def new_tokens(self) -> int:
        """Tokens kept free for the answer."""
        return self.max_new_tokens or NEW_TOKENS_A_NEEDLE * self.retrieve


class VideoNeedleOptions(GridOptions):
    """How the video needle suite asks. Lengths are in frames."""

    frames: tuple[PositiveInt, ...] | None = Field(
        default=None, min_length=1,
        description="frames of the clips; default: as many as fit every stage's length and the start's",
    )  # fmt: skip
    samples: PositiveInt = Field(default=16, description="samples a clip length at each stage, spread over the depths")
    samples_longest: PositiveInt = Field(
        default=40, description="samples of the longest clips where samples_longest_at says so"
    )
    asked: Asked = Field(default="colour", description="what the needle is asked for: colour, shape or digit")
    needle_frames: PositiveInt = Field(default=1, description="frames that show the needle, one after the other")
    choose: bool = Field(
        default=True,
        description="also score every answer's likelihood, which reads the clip once for each (8 colours or shapes, "
        "10 digits)",
    )
    max_new_tokens: PositiveInt = Field(default=16, description="tokens the model may answer with")
    haystack: str | None = Field(
        default=None,
        description="folder of codes by lwm encode to hide needles in; of one that is trained on, what its source "
        "holds out; default: a moving background that is drawn",
    )
    background_frames: PositiveInt = Field(
        default=128, description="frames of the drawn background before it begins again, where there is no haystack"
    )


class ReconstructionOptions(Options):
    """What the encoder is to reconstruct."""

    path: str | None = Field(
        default=None, description="a picture, a video or a folder of them; default: pictures that are drawn"
    )
    frames: PositiveInt = Field(default=32, description="frames at most, evenly spaced over all there are")


class VideoContinuationOptions(Options):
    """Which clip is continued, and from where."""

    path: str = Field(description="a video, or a folder of pictures whose names are in the order of the frames")
    every: PositiveInt = Field(default=1, description="of the frames there are, every n-th is taken")
    given: PositiveInt = Field(default=4, description="frames that the model is shown")
    frames: PositiveInt = Field(default=4, description="frames that it writes after them")
    at: NonNegativeInt | None = Field(
        default=None,
        description="the first frame shown, of those taken; default: so that the clip's last one is written",
    )
    caption: str | None = Field(
        default=None, description="what the clip was captioned with in training; default: clips without a text"
    )
    temperature: NonNegativeFloat = Field(default=0.0, description="of the draw; 0 takes the likeliest code")
    top_k: NonNegativeInt = Field(default=0, description="draw from so many of the likeliest codes; 0: from all")


class VideoLossOptions(Options):
    """What is predicted, and from how much."""

    path: str | None = Field(
        default=None,
        description="folder of codes by lwm encode; of one that is trained on, what its source holds out is read; "
        "default: the one folder of which a data source holds clips out",
    )
    frames: tuple[PositiveInt, ...] | None = Field(
        default=None, min_length=1,
        description="frames before the one that is predicted; default: 1, 2, 4, ... as far as the longest stage and "
        "the longest video go",
    )  # fmt: skip
    samples: PositiveInt = Field(default=16, description="frames that are predicted, each from every number before it")
