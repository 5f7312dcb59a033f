"""Options of the attention ``jax-ring``. Imports pydantic alone."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class AttentionOptions(BaseModel):
    """How attention runs over the ``sp`` axis of the mesh."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strategy: Literal["ring", "allgather", "ulysses", "usp", "auto"] = Field(
        "ring", description="how keys and values reach the queries; auto: the cheapest by heads, mesh and devices"
    )
    document: int | None = Field(
        None, gt=0, description="auto: mean tokens of a document in packed rows, if known; none: one fills the row"
    )
    layout: Literal["contiguous", "zigzag", "striped"] = Field(
        "zigzag", description="how tokens are dealt to ranks; zigzag evens out causal work; ulysses has one rank"
    )
    inner: int | None = Field(
        None, gt=0, description="usp: neighbours that exchange heads; sp's largest divisor up to its root by default"
    )
    kernel: Literal["auto", "xla", "pallas-tpu", "cudnn"] = Field(
        "auto", description="what computes a block between two transfers; auto: pallas-tpu on a TPU, else xla"
    )
    query_chunk: int = Field(256, gt=0, description="xla: queries computed at a time, in tokens")
    key_chunk: int = Field(256, gt=0, description="xla: keys computed at a time, in tokens")
    block_q: int | None = Field(None, gt=0, description="pallas-tpu: queries computed at a time; by dtype by default")
    block_k: int | None = Field(None, gt=0, description="pallas-tpu: keys computed at a time; by dtype by default")
    fused_block: int = Field(8192, gt=0, description="cudnn: queries, and keys, that it is given at a time at most")
    interpret: bool = Field(
        False, description="pallas-tpu, cudnn: play the kernel in plain operations where its device is not; slow"
    )
    softcap: float | None = Field(
        None, gt=0, description="bends the scores softly into ±softcap, for models trained so; none: as they are"
    )

    @model_validator(mode="after")
    def _document_is_autos(self) -> AttentionOptions:
        if self.document is not None and self.strategy != "auto":
            raise ValueError(f"document belongs to strategy 'auto', but strategy is {self.strategy!r}; remove it")
        return self

    @model_validator(mode="after")
    def _inner_is_usps(self) -> AttentionOptions:
        if self.inner is not None and self.strategy != "usp":
            raise ValueError(f"inner belongs to strategy 'usp', but strategy is {self.strategy!r}; remove it")
        return self
