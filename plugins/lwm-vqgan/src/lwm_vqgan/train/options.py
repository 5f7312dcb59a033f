"""What a training run of a VQGAN is made of."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator


class TrainOptions(BaseModel):
    """Length, optimizer, losses and codebook of a training run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(20_000, gt=0, description="steps in all; may be changed when a run is continued")
    batch: int = Field(16, gt=0, description="crops a step")
    lr: float = Field(1e-3, gt=0, description="learning rate after the warm-up")
    warmup_steps: int = Field(200, ge=0, description="steps in which the learning rate rises from 0")
    decay_share: float = Field(0.3, ge=0, le=1, description="last share of the steps, in which it falls to 0")
    beta1: float = Field(0.9, ge=0, lt=1, description="Adam's decay of the first moment")
    beta2: float = Field(0.99, ge=0, lt=1, description="Adam's decay of the second moment")
    clip_norm: float = Field(1.0, gt=0, description="gradient norm above which gradients are scaled down")
    weight_decay_mean: float = Field(0.999, ge=0, lt=1, description="decay of the running mean of weights that is kept")

    l1: float = Field(0.5, ge=0, description="weight of the mean absolute error of pixels in [-1, 1]")
    l2: float = Field(5.0, ge=0, description="weight of their mean squared error")
    perceptual: float = Field(0.5, ge=0, description="weight of the error of image gradients at three scales")
    commitment: float = Field(0.25, ge=0, description="weight that holds latents near their codebook vector")
    adversarial: float = Field(0.0, ge=0, description="weight of the patch discriminator; 0: there is none")
    adversarial_from: int = Field(10_000, ge=0, description="step from which the discriminator is heard")

    codebook_from: int = Field(500, ge=0, description="step at which k-means makes the codebook; none is used before")
    codebook_decay: float = Field(0.99, ge=0, lt=1, description="decay of the running means that move the codebook")
    restart_every: int = Field(50, gt=0, description="steps between two looks for codes that are not used")
    restart_below: float = Field(0.05, ge=0, description="share of the mean use below which a code starts anew")

    seed: int = Field(0, ge=0, description="seeds weights, crops and the codebook")
    log_every: int = Field(50, gt=0, description="steps between two lines")
    save_every: int = Field(200, gt=0, description="steps between two saves of the state")

    @model_validator(mode="after")
    def _something_to_learn(self) -> TrainOptions:
        if self.l1 + self.l2 + self.perceptual == 0:
            raise ValueError("l1, l2 and perceptual are all 0; give at least one a weight, else nothing is learnt")
        return self

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        rise = min(1.0, (step + 1) / (self.warmup_steps + 1))
        fall = max(1.0, self.steps * self.decay_share)
        return self.lr * min(rise, 1.0, (self.steps - step) / fall)

    def decaying(self, step: int) -> bool:
        """Whether the learning rate falls already."""
        return step >= self.steps * (1 - self.decay_share)
