"""The VQGAN's shape, from which both frameworks build the model."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator


class VqganConfig(BaseModel):
    """A convolutional autoencoder with a codebook between its halves (Esser et al. 2021, "Taming Transformers").

    The defaults are the VQGAN of LWM, which is aMUSEd's: 146,244,675 parameters. There is no attention anywhere.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    frame_size: int = Field(256, gt=0, description="height and width of a frame in pixels")
    base_channels: int = Field(128, gt=0, description="channels at full resolution, before the multiplier")
    channel_multipliers: tuple[int, ...] = Field(
        (1, 2, 2, 4, 6), min_length=1, description="channels of each level over base_channels; a level halves the size"
    )
    encoder_blocks: int = Field(2, gt=0, description="residual blocks a level in the encoder")
    decoder_blocks: int = Field(3, gt=0, description="residual blocks a level in the decoder")
    latent_channels: int = Field(64, gt=0, description="channels between the halves and the 1×1 convolutions")
    code_dim: int = Field(64, gt=0, description="length of a codebook vector")
    codes: int = Field(8192, gt=0, description="codebook vectors")
    norm_groups: int = Field(32, gt=0, description="groups of every GroupNorm; divides the channels of every level")

    @model_validator(mode="after")
    def _fits(self) -> VqganConfig:
        if any(multiplier < 1 for multiplier in self.channel_multipliers):
            raise ValueError(f"channel_multipliers = {self.channel_multipliers}; expected whole numbers from 1")
        if self.frame_size % self.downsample:
            raise ValueError(
                f"frame_size = {self.frame_size} does not divide by {self.downsample}, which "
                f"{len(self.channel_multipliers)} levels shrink it by"
            )
        uneven = [channels for channels in self.channels if channels % self.norm_groups]
        if uneven:
            raise ValueError(f"norm_groups = {self.norm_groups} does not divide the {uneven[0]} channels of a level")
        return self

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level, from full resolution down."""
        return tuple(self.base_channels * multiplier for multiplier in self.channel_multipliers)

    @property
    def downsample(self) -> int:
        """Pixels that one code stands for, in each direction (LWM: 16)."""
        return 1 << (len(self.channel_multipliers) - 1)

    @property
    def grid(self) -> int:
        """Codes in a row and in a column of a frame (LWM: 16)."""
        return self.frame_size // self.downsample

    @property
    def codes_per_frame(self) -> int:
        """Codes of one frame (LWM: 256)."""
        return self.grid * self.grid
