"""One training step of a VQGAN, and everything that a step leaves behind.

Shapes: B crops, [B,3,H,W] pixels in [−1, 1], latents [B,h,w,D], N = B·h·w.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lwm_core.errors import CheckpointError, TrainingError
from lwm_vqgan.model.config import VqganConfig
from lwm_vqgan.model.parameters import CODEBOOK
from lwm_vqgan.model.torch_vqgan import TorchVqgan
from lwm_vqgan.train.codebook import RunningCodebook, k_means
from lwm_vqgan.train.discriminator import PatchDiscriminator
from lwm_vqgan.train.losses import adaptive_weight, discriminator_loss, generator_loss, gradient_error
from lwm_vqgan.train.options import TrainOptions
from lwm_vqgan.train.pictures import Pictures

_K_MEANS_LATENTS_A_CODE = 16
_K_MEANS_ROUNDS = 6
_K_MEANS_CROPS = 32  # encoded at once


class VqganTrainer:
    """A model in training. A step depends on the state and on (seed, step) alone, so a run can be continued exactly."""

    def __init__(self, config: VqganConfig, options: TrainOptions, pictures: Pictures) -> None:
        self.config, self.options, self._pictures = config, options, pictures
        self.step = 0
        torch.manual_seed(options.seed)
        self.model = TorchVqgan(config)
        self.model.begin()
        self._learnt = {
            name: parameter.requires_grad_(name != CODEBOOK) for name, parameter in self.model.named_parameters()
        }
        self._mean = {name: parameter.detach().clone() for name, parameter in self._learnt.items() if name != CODEBOOK}
        self._codebook = RunningCodebook(self.model.quantize, options.codebook_decay)
        self._adam = self._optimizer(self.model)
        self._critic = PatchDiscriminator() if options.adversarial else None
        self._critic_adam = None if self._critic is None else self._optimizer(self._critic)

    def _optimizer(self, module: torch.nn.Module) -> torch.optim.Adam:
        learnt = [parameter for parameter in module.parameters() if parameter.requires_grad]
        return torch.optim.Adam(learnt, lr=self.options.lr, betas=(self.options.beta1, self.options.beta2))

    def advance(self) -> dict[str, float | Tensor]:
        """Do one step; its numbers, and the codes [N] that were used (none while there is no codebook).

        Raises:
            TrainingError: the loss is not finite.
        """
        options = self.options
        if self.step == options.codebook_from:
            self._make_codebook()
        wanted = pixels_of(self._pictures.batch(options.seed, self.step, options.batch))
        latents = self.model.latents(wanted)
        quantized, codes, commitment = self._quantize(latents)
        made = self.model.pixels(quantized)
        l2 = (made - wanted).square().mean()
        loss = options.l2 * l2 + options.commitment * commitment
        loss = loss + options.l1 * (made - wanted).abs().mean()
        loss = loss + options.perceptual * gradient_error(made, wanted)
        row: dict[str, float | Tensor] = {"loss": loss.item(), "psnr": psnr_of(l2.item())}
        if not np.isfinite(row["loss"]):
            raise TrainingError(f"step {self.step + 1}: the loss is {row['loss']}; lower the learning rate")
        if self._critic is not None and self.step >= options.adversarial_from:
            loss = loss + self._adversarial(loss, made)
        self._descend(self._adam, loss)
        if self._critic is not None and self.step >= options.adversarial_from:
            row["critic"] = self._teach_critic(wanted, made.detach())
        if codes is not None:
            row["codes"] = codes
            row["restarted"] = self._move_codebook(latents.detach(), codes)
        self._follow_mean()
        self.step += 1
        return row

    def _quantize(self, latents: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Latents rounded to the codebook with the gradient passed straight through, their codes, the commitment."""
        if self.step < self.options.codebook_from:
            return latents, None, latents.new_zeros(())
        codes = self.model.quantize.nearest(latents.detach())
        vectors = self.model.quantize(codes)
        commitment = (latents - vectors).square().mean()
        return latents + (vectors - latents).detach(), codes.flatten(), commitment

    def _descend(self, adam: torch.optim.Adam, loss: Tensor) -> None:
        adam.zero_grad(set_to_none=True)
        loss.backward()
        for group in adam.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], self.options.clip_norm)
            group["lr"] = self.options.lr_at(self.step)
        adam.step()

    def _adversarial(self, reconstruction: Tensor, made: Tensor) -> Tensor:
        assert self._critic is not None
        fooled = generator_loss(self._critic(made))
        last = self.model.decoder.conv_out.weight
        return self.options.adversarial * adaptive_weight(reconstruction, fooled, last) * fooled

    def _teach_critic(self, real: Tensor, made: Tensor) -> float:
        assert self._critic is not None and self._critic_adam is not None
        loss = discriminator_loss(self._critic(real), self._critic(made))
        self._descend(self._critic_adam, loss)
        return loss.item()

    def _random(self) -> torch.Generator:
        """Random numbers of this step."""
        return torch.Generator().manual_seed(self.options.seed * 1_000_003 + self.step)

    @torch.no_grad()
    def _make_codebook(self) -> None:
        config, options = self.config, self.options
        crops = -(-config.codes * _K_MEANS_LATENTS_A_CODE // config.codes_per_frame)
        pools = [
            self.model.latents(pixels_of(self._pictures.batch(options.seed + 1, index, _K_MEANS_CROPS))).flatten(0, 2)
            for index in range(-(-crops // _K_MEANS_CROPS))
        ]
        centres = k_means(torch.cat(pools), config.codes, _K_MEANS_ROUNDS, self._random())
        self._codebook.begin(centres, options.batch * config.codes_per_frame)

    def _move_codebook(self, latents: Tensor, codes: Tensor) -> float:
        """Move the codebook; how many codes started anew (none once the learning rate falls)."""
        flat, options = latents.flatten(0, 2), self.options
        self._codebook.follow(flat, codes)
        if (self.step + 1) % options.restart_every or options.decaying(self.step):
            return 0.0
        return float(self._codebook.restart(flat, options.restart_below, self._random()))

    @torch.no_grad()
    def _follow_mean(self) -> None:
        # Shorter at first: a mean of the first steps would be a mean of random weights.
        decay = min(self.options.weight_decay_mean, (1 + self.step) / (10 + self.step))
        for name, mean in self._mean.items():
            mean.lerp_(self._learnt[name], 1 - decay)

    def kept(self) -> dict[str, NDArray[np.float32]]:
        """The parameters to keep: the running mean of the weights, and the codebook as it is."""
        tensors = {**self._mean, CODEBOOK: self._learnt[CODEBOOK].detach()}
        return {name: tensor.numpy().copy() for name, tensor in tensors.items()}

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the state but the optimizers', which come into being at their first step."""
        yield from ((f"model.{name}", parameter.detach()) for name, parameter in self._learnt.items())
        yield from ((f"mean.{name}", tensor) for name, tensor in self._mean.items())
        yield "codebook.counts", self._codebook.counts
        yield "codebook.sums", self._codebook.sums
        if self._critic is not None:
            yield from ((f"critic.{name}", tensor) for name, tensor in self._critic.state_dict().items())

    def _adams(self) -> dict[str, torch.optim.Adam]:
        pairs = {"adam": self._adam, "critic_adam": self._critic_adam}
        return {name: adam for name, adam in pairs.items() if adam is not None}

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on, ``step`` itself included."""
        tensors = dict(self._tensors()) | {"step": torch.tensor(self.step)}
        for prefix, adam in self._adams().items():
            for index, slots in adam.state_dict()["state"].items():
                tensors |= {f"{prefix}.{index}.{slot}": tensor for slot, tensor in slots.items()}
        return tensors

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` gave.

        Raises:
            CheckpointError: the state is of another model or of other losses.
        """
        for name, own in self._tensors():
            if name not in tensors or tensors[name].shape != own.shape:
                raise CheckpointError(f"the saved state has no {name} of shape {tuple(own.shape)}; begin a new run")
            own.copy_(tensors[name])
        for prefix, adam in self._adams().items():
            slots: dict[int, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                if name.startswith(f"{prefix}."):
                    _, index, slot = name.split(".")
                    slots.setdefault(int(index), {})[slot] = tensor.clone()
            adam.load_state_dict({"state": slots, "param_groups": adam.state_dict()["param_groups"]})
        self.step = int(tensors["step"])


def pixels_of(frames: NDArray[np.uint8]) -> Tensor:
    """[B,H,W,3] uint8 → [B,3,H,W] float32 in [−1, 1]."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).to(torch.float32).div(127.5).sub(1.0).contiguous()


def psnr_of(l2: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error of pixels in [−1, 1]."""
    return float(10 * np.log10(4.0 / max(l2, 1e-12)))
