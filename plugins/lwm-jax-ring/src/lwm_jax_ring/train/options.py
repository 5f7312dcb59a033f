"""Options of the trainer ``jax``. Imports pydantic alone."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class TrainerOptions(BaseModel):
    """How the model is computed and where."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    compute_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype of activations; parameters and optimizer are float32 always"
    )
    remat: Literal["none", "full", "attention", "offload", "dots"] = Field(
        "attention",
        description="what a layer keeps for its backward pass; 'attention' never runs the ring twice, "
        "nor does 'offload', which keeps all in the host's memory",
    )
    loss_chunk: int = Field(1024, gt=0, description="tokens of a device whose logits exist at a time")
    token_chunk: int | None = Field(
        None, gt=0, description="tokens of a device in projections and feed-forward at a time; all if unset"
    )
    read_chunk: int = Field(
        8192, gt=0, description="tokens of a prompt that are read at a time when the model writes; memory grows with it"
    )
    cache: Literal["compute", "bfloat16", "int8"] = Field(
        "compute", description="how keys and values of a prompt are kept; int8 with a scale a page and head"
    )
    shard_parameters: list[Literal["dp", "fsdp", "sp"]] = Field(
        default_factory=lambda: ["fsdp", "sp"], description="axes that share parameters out beside tp; [] replicates"
    )
    host_devices: int | None = Field(
        None, gt=0, description="make a process's CPU stand for this many devices; for trying meshes on one machine"
    )
    join_timeout: int = Field(300, gt=0, description="seconds that the processes of a run wait for each other to come")
    peak_flops: float | None = Field(
        None, gt=0, description="peak FLOP/s of one device, the denominator of MFU; known chips and CPUs need none"
    )
