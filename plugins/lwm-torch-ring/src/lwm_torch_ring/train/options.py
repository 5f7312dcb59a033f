"""Options of the trainer ``torch``. Imports pydantic alone."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class TrainerOptions(BaseModel):
    """How the model is computed and where."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where ranks compute; auto: on NVIDIA GPUs where torch sees some, else on the CPU"
    )
    compute_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype of activations; parameters and optimizer are float32 always"
    )
    remat: Literal["none", "full", "attention", "offload", "dots"] = Field(
        "attention",
        description="what a layer keeps for its backward pass; 'attention' never runs the ring twice, "
        "nor does 'offload', which keeps all in the host's memory",
    )
    compile: bool = Field(
        False, description="compile each layer of a step by torch.compile, as a whole; not with remat = 'offload'"
    )
    loss_chunk: int = Field(1024, gt=0, description="tokens of a rank whose logits exist at a time")
    token_chunk: int | None = Field(
        None, gt=0, description="tokens of a rank in projections and feed-forward at a time; all if unset"
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
    timeout: float = Field(
        3600.0, gt=0, description="seconds that a rank waits for one that is alive; of one that died it hears at once"
    )
    peak_flops: float | None = Field(
        None, gt=0, description="peak FLOP/s of one device, the denominator of MFU; known GPUs and CPUs need none"
    )

    @model_validator(mode="after")
    def _check_compile(self) -> TrainerOptions:
        if self.compile and self.remat == "offload":
            raise ValueError(
                "compile does not go with remat = 'offload': what a compiled layer keeps stays on the device; choose "
                "another remat, or leave compile out"
            )
        return self
