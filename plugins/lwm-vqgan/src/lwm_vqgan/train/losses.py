"""What a reconstruction is judged by. Pixels are [B,3,H,W] in [−1, 1]."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

GRADIENT_SCALES = 3


def gradient_error(made: Tensor, wanted: Tensor) -> Tensor:
    """Mean absolute error of the differences between neighbouring pixels, at full, half and quarter size.

    The perceptual term. A mean of pixel errors is least for a blurred picture where detail is uncertain; edges that
    are lost, doubled or shifted cost the same here wherever they are. It needs no network, so nothing is downloaded.
    (The gradient difference loss of Mathieu et al. 2016, "Deep multi-scale video prediction", with its exponent at
    1, over a pyramid.)
    """
    error = made - wanted  # differences are linear: the error's gradient is the gradients' error
    total = error.new_zeros(())
    for scale in range(GRADIENT_SCALES):
        if scale:
            error = functional.avg_pool2d(error, 2)
        total = total + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
        total = total + (error[..., :, 1:] - error[..., :, :-1]).abs().mean()
    return total / GRADIENT_SCALES


def generator_loss(verdict: Tensor) -> Tensor:
    """What the model adds for being found out: less the more real its pictures seem."""
    return -verdict.mean()


def discriminator_loss(real: Tensor, made: Tensor) -> Tensor:
    """Hinge loss of the discriminator (Lim and Ye 2017, "Geometric GAN")."""
    return 0.5 * (functional.relu(1.0 - real).mean() + functional.relu(1.0 + made).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor, largest: float = 1e4) -> Tensor:
    """The ratio of the two losses' gradients at the decoder's last weights (Esser et al. 2021, equation 7).

    With it the adversarial term pulls as hard as the reconstruction does, whatever their sizes.
    """
    (pull,) = torch.autograd.grad(reconstruction, last, retain_graph=True)
    push = torch.autograd.grad(adversarial, last, retain_graph=True)[0]
    return (pull.norm() / (push.norm() + 1e-4)).clamp(0.0, largest).detach()
