"""The envelope of a run's configuration: everything but the plugins' own options, which stay plain tables here.

These models are the only source of defaults. A plugin's table is ``{name = "...", ...}``; what stands beside
``name`` is validated later by the named plugin's own model.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Table(BaseModel):
    """A table whose keys are all known; a key that is not is an error, never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PluginTable(BaseModel):
    """``{name, ...}``: a plugin chosen by name and its options, unread until the plugin is found."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = Field(description="plugin name, 'auto', or 'distribution:name' where two offer the same name")

    @property
    def options(self) -> dict[str, Any]:
        """The options beside ``name``, as they stand in the file."""
        return dict(self.__pydantic_extra__ or {})


class ModelTable(Table):
    """The model's shape: a preset, and what differs from it."""

    preset: str = Field("tiny", description="one of lwm_core.model.PRESETS")
    hidden_size: int | None = Field(None, gt=0, description="width of the residual stream")
    intermediate_size: int | None = Field(None, gt=0, description="width of the feed-forward")
    num_layers: int | None = Field(None, gt=0, description="decoder layers")
    num_heads: int | None = Field(None, gt=0, description="query heads H")
    num_kv_heads: int | None = Field(None, gt=0, description="key-value heads K; divides H")
    head_dim: int | None = Field(None, gt=0, description="head dim D; hidden_size / H by default")
    tie_embeddings: bool | None = Field(None, description="one table for the embedding and the output head")
    rms_norm_eps: float | None = Field(None, gt=0, description="epsilon of RMSNorm")
    init_std: float | None = Field(None, gt=0, description="deviation of a new model's matrices; 0.02 by default")
    text_size: int | None = Field(None, gt=0, description="rows for text ids; as many as the tokenizer has by default")
    vision_size: int | None = Field(None, ge=0, description="rows for vision ids after the text ids (LWM: 8448)")


class OptimizerTable(Table):
    """AdamW. The learning rate and its schedule belong to a stage."""

    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the second moment")
    eps: float = Field(1e-8, gt=0, description="added to the square root of the second moment")
    weight_decay: float = Field(0.1, ge=0, description="decoupled decay of matrices; norms are not decayed")
    clip_norm: float = Field(1.0, gt=0, description="global gradient norm above which gradients are scaled down")


class LossTable(Table):
    """The weight of each modality's mean cross-entropy in the loss (LWM's vision stages: 0.5 and 0.5)."""

    text: float = Field(1.0, ge=0, description="alpha of text targets")
    vision: float = Field(1.0, ge=0, description="alpha of vision targets")


class StageTable(Table):
    """One leg of a schedule, started from where the one before ended."""

    name: str = Field("", description="how reports call it; its length by default")
    seq_len: int = Field(gt=0, description="tokens a row S")
    theta: float = Field(10_000.0, gt=0, description="RoPE base")
    tokens: int = Field(gt=0, description="tokens to train on, padding included; rounded up to whole steps")
    batch_tokens: int = Field(gt=0, description="tokens a step over all data ranks; a multiple of seq_len")
    lr: float = Field(gt=0, description="peak learning rate")
    min_lr: float | None = Field(None, ge=0, description="learning rate at the end of a cosine; 0.1 lr by default")
    lr_schedule: Literal["constant", "cosine"] = Field("constant", description="shape after the warm-up")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up from 0")
    accumulate: int = Field(1, gt=0, description="micro-batches a step; divides the rows of a step")
    mesh: str = Field("1,1,1,-1", description="sizes of dp,fsdp,tp,sp; one may be -1")
    mix: dict[str, float] | None = Field(None, description="weight of each data source; the data table's by default")

    @model_validator(mode="after")
    def _whole_rows(self) -> StageTable:
        if self.batch_tokens % self.seq_len:
            raise ValueError(
                f"batch_tokens = {self.batch_tokens} is not a multiple of seq_len = {self.seq_len}; "
                f"use {max(1, self.batch_tokens // self.seq_len) * self.seq_len}"
            )
        rows = self.batch_tokens // self.seq_len
        if rows % self.accumulate:
            raise ValueError(f"accumulate = {self.accumulate} does not divide the {rows} rows of a step")
        return self

    @field_validator("mesh")
    @classmethod
    def _mesh_reads(cls, value: str) -> str:
        from lwm_core.mesh import parse_mesh

        parse_mesh(value)
        return value


class RunTable(Table):
    """How the run is watched and kept."""

    out: str | None = Field(None, description="folder of the run; runs/NAME by default")
    log_every: int = Field(10, gt=0, description="steps between two lines of the log; metrics.jsonl has every step")
    checkpoint_every: int = Field(100, gt=0, description="steps between two checkpoints; a stage ends with one")
    keep_checkpoints: int = Field(2, gt=0, description="newest checkpoints kept")
    eval_base: bool = Field(True, description="run the evals on the starting model too, as stage 'base'")


class SampleTable(Table):
    """Text written by the model after its last stage, for the report."""

    prompts: list[str] = Field(default_factory=list, description="prompts to continue")
    max_new_tokens: int = Field(64, gt=0, description="tokens to write for each")
    temperature: float = Field(0.8, ge=0, description="0 is greedy")
    top_p: float = Field(0.95, gt=0, le=1, description="nucleus of the distribution that is sampled from")


class PluginsTable(Table):
    """Which distributions may give plugins; both lists hold distribution names."""

    allow: list[str] | None = Field(None, description="only these, beside lwm-core; everything installed by default")
    deny: list[str] = Field(default_factory=list, description="not these")


class RunConfig(Table):
    """A whole run, from the model it starts from to the report it ends with."""

    summary: str = Field("", description="one line on what the recipe is for")
    name: str = Field("run", description="name of the run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0, description="seeds the parameters, the feed and sampling")
    init: str = Field("random", description="'random', the name of a weights plugin, or a folder of a model")
    model: ModelTable = Field(default_factory=lambda: ModelTable())
    tokenizer: PluginTable = Field(default_factory=lambda: PluginTable(name="bytes"))
    trainer: PluginTable = Field(default_factory=lambda: PluginTable(name="auto"))
    attention: PluginTable = Field(default_factory=lambda: PluginTable(name="auto"))
    encoder: PluginTable | None = Field(None, description="frames to codes and back, for runs with vision")
    context: PluginTable | None = Field(None, description="a schedule plugin; or write [[stages]]")
    stages: list[StageTable] = Field(default_factory=list, description="a literal schedule; or name a context plugin")
    data: PluginTable = Field(description="the feed")
    optimizer: OptimizerTable = Field(default_factory=lambda: OptimizerTable())
    loss: LossTable = Field(default_factory=lambda: LossTable())
    evals: list[PluginTable] = Field(default_factory=list, description="suites run after each stage")
    samples: SampleTable = Field(default_factory=lambda: SampleTable())
    run: RunTable = Field(default_factory=lambda: RunTable())
    plugins: PluginsTable = Field(default_factory=lambda: PluginsTable())

    @model_validator(mode="after")
    def _one_schedule(self) -> RunConfig:
        if (self.context is None) == (not self.stages):
            raise ValueError("give either a [context] plugin or a literal [[stages]] list, and not both")
        return self
