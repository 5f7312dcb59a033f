"""Options of the tokenizer ``hf``."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lwm_hf.bpe import MIN_VOCAB_SIZE


class TrainOptions(BaseModel):
    """A byte-level BPE trained on text files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    files: list[str] = Field(
        min_length=1, description="texts (.txt, .xz, .gz): paths, or DIST:PATH for a file of an installed package"
    )
    vocab_size: int = Field(4096, ge=MIN_VOCAB_SIZE, description="ids in all: 256 bytes, 5 special tokens, merges")
    min_frequency: int = Field(2, gt=0, description="times a pair must be seen to be merged")


class HfTokenizerOptions(BaseModel):
    """Where the tokenizer comes from: a file, training, or (neither) the folder of the model in ``init``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str | None = Field(None, min_length=1, description="a tokenizer.json, or a folder that holds one")
    train: TrainOptions | None = Field(None, description="train a byte-level BPE instead")
    bos: str | None = Field(None, min_length=1, description="token that begins a document; found by itself if unset")
    eos: str | None = Field(None, min_length=1, description="token that ends a document; found by itself if unset")
    pad: str | None = Field(None, min_length=1, description="token that fills rows; found by itself if unset")

    @model_validator(mode="after")
    def _one_origin(self) -> HfTokenizerOptions:
        if self.path is not None and self.train is not None:
            raise ValueError("path and train are both given; a tokenizer is either loaded or trained, so remove one")
        return self
