"""Options of the schedule ``progressive``: one value for all stages, or a list with one for each."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lwm_core.errors import ConfigError

ThetaRule = Literal["keep", "ntk", "base-bound"]

#: Options that are handed to each stage's table as they are.
STAGE_KEYS = (
    "tokens", "batch_tokens", "lr", "min_lr", "lr_schedule", "warmup_steps", "accumulate", "mesh", "mix",
)  # fmt: skip
PER_STAGE_KEYS = (*STAGE_KEYS, "theta", "scaling")


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NoScaling(_Table):
    """Plain RoPE."""

    name: Literal["none"]


class FactorScaling(_Table):
    """Position interpolation (``linear``) or NTK-aware base change (``ntk``)."""

    name: Literal["linear", "ntk"]
    factor: float | None = Field(None, ge=1, description="s; the stage's length over original by default")
    original: int | None = Field(None, gt=0, description="length trained at; the start model's by default")


class YarnScaling(_Table):
    """YaRN."""

    name: Literal["yarn"]
    factor: float | None = Field(None, ge=1, description="s; the stage's length over original by default")
    original: int | None = Field(None, gt=0, description="length trained at; the start model's by default")
    beta_fast: float = Field(32.0, gt=0, description="turns over original from which a frequency stays")
    beta_slow: float = Field(1.0, gt=0, description="turns over original up to which a frequency is divided by s")
    truncate: bool = Field(True, description="round the ends of the ramp to whole pairs")
    attention_factor: float | None = Field(None, gt=0, description="multiplies cos and sin; 0.1 ln s + 1 by default")


class Llama3Scaling(_Table):
    """Llama 3.1's scaling."""

    name: Literal["llama3"]
    factor: float | None = Field(None, ge=1, description="s; the stage's length over original by default")
    original: int | None = Field(None, gt=0, description="length trained at; the start model's by default")
    low_freq_factor: float = Field(1.0, gt=0, description="turns over original up to which f is divided by s")
    high_freq_factor: float = Field(4.0, gt=0, description="turns over original from which f stays")


Scaling = Annotated[NoScaling | FactorScaling | YarnScaling | Llama3Scaling, Field(discriminator="name")]


class ProgressiveOptions(_Table):
    """Stages by rule (``to``, ``from``, ``factor``) or by list (``lengths``)."""

    lengths: list[int] | None = Field(None, min_length=1, description="tokens a row of each stage, never shrinking")
    to: int | None = Field(None, gt=0, description="tokens a row of the last stage; or give lengths")
    from_: int | None = Field(None, alias="from", gt=0, description="length begun from; the start model's by default")
    factor: int | None = Field(None, ge=2, description="length of a stage over that of the one before; 2 by default")
    names: list[str] | None = Field(None, description="how reports call the stages; their lengths by default")
    theta: float | ThetaRule | list[float | ThetaRule] | None = Field(
        None, description="RoPE base, or a rule for it; 'ntk' by default, 'keep' where a scaling is given"
    )
    scaling: Scaling | list[Scaling] | None = Field(None, description="RoPE scaling {name, ...}")
    tokens: int | list[int] = Field(description="tokens to train on; rounded up to whole steps")
    batch_tokens: int | list[int] = Field(description="tokens a step over all data ranks; a multiple of the length")
    lr: float | list[float] = Field(description="peak learning rate")
    min_lr: float | list[float] | None = Field(None, description="learning rate at the end of a cosine; 0.1 lr")
    lr_schedule: str | list[str] = Field("constant", description="'constant' or 'cosine', after the warm-up")
    warmup_steps: int | list[int] = Field(0, description="steps of linear warm-up from 0")
    accumulate: int | list[int] = Field(1, description="micro-batches a step")
    mesh: str | list[str] = Field("1,1,1,-1", description="sizes of dp,fsdp,tp,sp; one may be -1")
    mix: dict[str, float] | list[dict[str, float]] | None = Field(None, description="weight of each data source")

    @model_validator(mode="after")
    def _one_rule(self) -> ProgressiveOptions:
        if (self.lengths is None) == (self.to is None):
            raise ValueError("give either lengths = [...] or to = N (with from and factor), and not both")
        if self.lengths is not None and self.factor is not None:
            raise ValueError("factor belongs to the rule (to, from, factor); lengths are given, so remove it")
        return self

    @model_validator(mode="after")
    def _stages_are_right(self) -> ProgressiveOptions:
        # Where the lengths are known without the start model, mistakes are told with the file and line of the option.
        if self.lengths is None and self.from_ is None:
            return self
        from lwm_context.stages import stage_lengths, stage_tables

        try:
            stage_tables(self, stage_lengths(self, None))
        except ConfigError as error:
            raise ValueError("; ".join(error.problems)) from error
        return self

    def at(self, key: str, stage: int) -> Any:
        """The value of option ``key`` for ``stage`` (from 0)."""
        value = getattr(self, key)
        return value[stage] if isinstance(value, list) else value
