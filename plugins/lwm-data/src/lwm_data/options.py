"""The options of the data plugin ``mix``: which sources there are and how they are mixed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lwm_core.prompts import Order, check_template
from lwm_data.field_language import check_fields, choose_fields

Share = Annotated[
    float,
    Field(gt=0, description="what an example's loss weights sum to, spread evenly over the tokens that are learnt"),
]
MinTokens = Annotated[
    int | None,
    Field(
        gt=1, description="shortest example in tokens; lengths are uniform from here to the longest; none: the longest"
    ),
]
MaxTokens = Annotated[
    int | None,
    Field(gt=1, description="longest example in tokens; shorter ones are packed; none, or more than a row: a row"),
]


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Measured(_Options):
    """Examples that are made to measure: full rows, or packed ones of a fixed length or of random ones."""

    min_tokens: MinTokens = None
    max_tokens: MaxTokens = None

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        if self.max_tokens is not None and (self.min_tokens or 0) > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")
        return self

    def lengths(self, seq_len: int) -> tuple[int, int]:
        """Tokens of the shortest and of the longest example in a row of ``seq_len``; the first may not fit."""
        longest = min(self.max_tokens or seq_len, seq_len)
        return self.min_tokens or longest, longest


class TextOptions(_Options):
    """Documents of a file, a folder, a glob or a shipped corpus, learnt token by token."""

    kind: Literal["text"] = Field(description="the source's kind")
    path: str | None = Field(
        default=None,
        description="file, folder or glob, from the folder the command runs in; .jsonl and .parquet give documents, "
        "anything else is plain text; .xz and .gz are unpacked; a folder gives its .txt, .jsonl and .parquet files",
    )
    corpus: Literal["kjv"] | None = Field(default=None, description="a text that ships with lwm-data, instead of path")
    split: Literal["file", "line", "blank-line"] = Field(
        default="file", description="what a document is in plain text: the file, each line, or blank-line-separated"
    )
    held_out: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="fraction that is never trained on: the last documents, or the last lines of every document where "
        "there are too few documents to split",
    )
    weigh: Literal["example", "token"] = Field(
        default="example",
        description="example: a short document weighs as much as a full row; token: every token weighs the same",
    )
    share: Share = 1.0

    @model_validator(mode="after")
    def _one_place(self) -> TextOptions:
        if (self.path is None) == (self.corpus is None):
            raise ValueError("a text source needs either path or corpus, and not both")
        return self


class NeedleOptions(_Measured):
    """LWM's needles planted in a text source of the same mix; only the answer is learnt."""

    kind: Literal["needle"] = Field(description="the source's kind")
    haystack: str = Field(description="name of the text source that the needles are planted in")
    needles: tuple[int, ...] = Field(default=(1,), min_length=1, description="numbers of needles to choose from")
    retrieve: tuple[int, ...] = Field(
        default=(1,), min_length=1, description="how many of them are asked for; a choice among those that fit"
    )
    turns: int = Field(
        default=1, ge=1, description="questions asked one after the other about one text, each with its answer"
    )
    share: Share = 1.0

    @model_validator(mode="after")
    def _enough(self) -> NeedleOptions:
        if min(*self.needles, *self.retrieve, 1) < 1:
            raise ValueError("needles and retrieve are numbers from 1")
        if min(self.retrieve) > min(self.needles):
            raise ValueError(
                f"retrieve asks for {min(self.retrieve)} needles or more, but only {min(self.needles)} may be planted"
            )
        return self


class CopyOptions(_Measured):
    """Synthetic copying: what was seen before is asked again, so that induction and retrieval are learnt densely."""

    kind: Literal["copy"] = Field(description="the source's kind")
    task: Literal["repeat", "pairs"] = Field(
        default="repeat",
        description="repeat: a span of tokens comes again, at once or after other tokens; pairs: 'key: value' lines in "
        "digits, then the keys again in another order",
    )
    text: str | None = Field(
        default=None, description="repeat: name of a text source whose spans are copied; none: random token ids"
    )
    min_period: int = Field(default=4, ge=2, description="repeat: tokens of the shortest span")
    max_period: int | None = Field(default=None, ge=2, description="repeat: tokens of the longest span; none: half")
    key_digits: int = Field(default=4, ge=1, le=18, description="pairs: digits of a key")
    value_digits: int = Field(default=4, ge=1, le=18, description="pairs: digits of a value")
    share: Share = 1.0

    @model_validator(mode="after")
    def _periods(self) -> CopyOptions:
        if self.max_period is not None and self.max_period < self.min_period:
            raise ValueError(f"max_period {self.max_period} is below min_period {self.min_period}")
        if self.task == "pairs" and self.text is not None:
            raise ValueError("text is an option of task 'repeat'; pairs are digits")
        return self


class VisionOptions(_Options):
    """Pictures and videos of a folder of codes, with or without captions, in LWM's orders and prompts."""

    kind: Literal["vision"] = Field(description="the source's kind")
    path: str = Field(description="folder that lwm encode wrote, from the folder the command runs in")
    captions: str | None = Field(
        default=None,
        description="file of texts by a picture's or video's name: .jsonl lines {name, text} and question or not, or "
        ".tsv lines name, text; .xz and .gz are unpacked; several lines of one name are as many examples",
    )
    order: Literal["text-vision", "vision-text", "text", "vision"] = Field(
        default="text-vision",
        description="what an example holds; the last is learnt: a clip after its text, a text after its clip, or one "
        "alone",
    )
    swap: float = Field(default=0.0, ge=0, le=1, description="probability that text and clip change places")
    drop: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="probability that the text before a clip that is learnt is left out, for classifier-free guidance",
    )
    max_frames: int | None = Field(
        default=None,
        ge=1,
        description="frames of a video at most; none: as many as a row holds",
    )
    sampling: Literal["uniform", "consecutive"] = Field(
        default="uniform",
        description="which frames of a longer video are taken: evenly spaced from the first to the last, or one after "
        "the other from a random one on, so that a video is seen at its own pace",
    )
    questions: tuple[str, ...] = Field(
        default=("Describe what you see.",),
        min_length=1,
        description="what is asked about a clip whose line of captions has no question of its own; a random one",
    )
    templates: dict[Order, str] = Field(
        default_factory=dict,
        description="text around {text}, {vision} and {question} by order, in place of LWM's prompts",
    )
    leave_out: tuple[Literal["no-caption", "no-clip", "no-frames", "too-long"], ...] = Field(
        default=(),
        description="what is left out instead of refused: clips without a caption, captions without a clip, clips "
        "without frames or no longer than held_out_frames, examples longer than a row",
    )
    held_out: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="fraction of the folder's clips that is never trained on, with all that is said of them, at least "
        "one where it is not 0: those whose names have the lowest SHA-256; evaluations read them",
    )
    held_out_frames: int = Field(
        default=0,
        ge=0,
        description="frames at the end of every clip that are never trained on; a clip that is no longer is refused",
    )
    verify: bool = Field(default=False, description="hold every file of codes against its SHA-256 before training")
    share: Share = 1.0

    @model_validator(mode="after")
    def _fits_order(self) -> VisionOptions:
        if (self.captions is None) != (self.order == "vision"):
            what = "takes no captions" if self.captions is not None else "needs captions"
            raise ValueError(f"order {self.order!r} {what}")
        if self.swap and self.order not in ("text-vision", "vision-text"):
            raise ValueError(f"swap is {self.swap}, but order {self.order!r} holds one part only")
        if self.drop and self.order != "text-vision" and not (self.order == "vision-text" and self.swap):
            raise ValueError(f"drop is {self.drop}, but order {self.order!r} never learns a clip after its text")
        for order, template in self.templates.items():
            check_template(order, template)
        return self


class JsonlOptions(_Options):
    """Lines of a .jsonl in LWM's field language."""

    kind: Literal["jsonl"] = Field(description="the source's kind")
    path: str = Field(
        description="file, folder or glob of .jsonl, from the folder the command runs in; read in place, so not packed"
    )
    fields: str | tuple[str, ...] | None = Field(
        default=None,
        description="the fields of an example, such as '[instruction],[vision],answer'; of several a random one by "
        "seed and line; none: each line's own 'fields'",
    )
    fields_index: int | None = Field(default=None, ge=0, description="of several, always this one, from 0")
    subfield_separator: str = Field(default=" ", description="what texts that '+' joins have between them")
    prepend_text: str = Field(default="", description="put before the text of the first field, and learnt as that is")
    bos: bool = Field(default=True, description="begin with the tokenizer's bos, where it has one")
    eos: bool = Field(default=True, description="end with the tokenizer's eos, where it has one; it is learnt")
    codes_per_frame: int = Field(default=256, ge=1, description="codes of a frame in the lines' vision fields")
    max_frames: int | None = Field(
        default=None, ge=1, description="frames of a vision field at most, evenly spaced; none: all of them"
    )
    leave_out: tuple[Literal["too-long"], ...] = Field(
        default=(), description="what is left out instead of refused: lines longer than a row"
    )
    share: Share = 1.0

    @model_validator(mode="after")
    def _parses(self) -> JsonlOptions:
        specs = (self.fields,) if isinstance(self.fields, str) else self.fields
        if specs is not None:
            choose_fields(specs, self.fields_index, 0, "fields")
            for number, spec in enumerate(specs):
                check_fields(spec, "fields" if isinstance(self.fields, str) else f"fields[{number}]", self.prepend_text)
        return self


SourceOptions = Annotated[
    TextOptions | NeedleOptions | CopyOptions | VisionOptions | JsonlOptions, Field(discriminator="kind")
]


class MixOptions(_Options):
    """Sources by name and the share of rows that each of them gets."""

    sources: dict[str, SourceOptions] = Field(min_length=1, description="sources by name")
    weights: dict[str, float] = Field(
        default_factory=dict,
        description="share of rows by source; sources left out get none; empty: all alike; a stage's mix overrides it",
    )
    workers: int = Field(default=0, ge=0, description="processes that build batches ahead; 0: a thread of this process")
    prefetch: int = Field(default=2, ge=0, description="batches built ahead; 0: each is built when it is asked for")
    window_rows: int = Field(default=256, ge=1, description="rows that are planned, mixed and packed together")

    @model_validator(mode="after")
    def _names(self) -> MixOptions:
        if self.weights:
            check_mix(self.weights, self.sources, "weights")
        texts = [name for name, source in self.sources.items() if source.kind == "text"]
        for name, source in self.sources.items():
            wanted = getattr(source, "haystack", None) or getattr(source, "text", None)
            if wanted is not None and wanted not in texts:
                raise ValueError(f"sources.{name}: {unknown('text source', wanted, texts)}")
        return self


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """One line about a name that is not known: the near miss, or all that are."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(names) or '(there is none)'}"
    return f"there is no {what} {name!r}; {hint}"


def check_mix(mix: dict[str, float], sources: Iterable[str], where: str) -> None:
    """Check a mix.

    Raises:
        ValueError: a name is not a source, a weight is negative or not finite, or all are 0.
    """
    names = list(sources)
    for name, weight in mix.items():
        if name not in names:
            raise ValueError(f"{where}: {unknown('source', name, names)}")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"{where}: the weight of {name!r} is {weight}; expected a finite number from 0")
    if not any(mix.values()):
        raise ValueError(f"{where}: every weight is 0; at least one source must get rows")
