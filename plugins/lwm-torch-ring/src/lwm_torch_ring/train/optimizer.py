"""AdamW (arXiv 1711.05101) with global-norm clipping on float32 parameters, torch's fused one.

Moments lie as their parameters do; they are kept by name, so that a checkpoint of them fits any mesh.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lwm_core.protocols import OptimizerSpec
from lwm_torch_ring.model.sharding import copies, local_part

MOMENTS = ("exp_avg", "exp_avg_sq")


def decays(name: str) -> bool:
    """Whether a parameter decays: matrices and tables do, norms and biases do not."""
    return name.endswith(".weight") and not name.endswith("norm.weight")


class AdamW:
    """The optimizer of named parameters; it works on what this rank holds of each."""

    def __init__(self, spec: OptimizerSpec, parameters: Mapping[str, Tensor]) -> None:
        self.spec = spec
        self._parameters = dict(parameters)
        # The fused kernel sees plain tensors: those of DTensors would go through a dispatcher, one by one.
        self._locals = {
            name: torch.nn.Parameter(local_part(parameter.detach())) for name, parameter in self._parameters.items()
        }
        groups = [
            {"params": [p for name, p in self._locals.items() if decays(name) == decay], "weight_decay": rate}
            for decay, rate in ((True, spec.weight_decay), (False, 0.0))
        ]
        self._torch = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=0.0, betas=(spec.beta1, spec.beta2), eps=spec.eps,
            fused=True,
        )  # fmt: skip
        self.reset()

    def reset(self) -> None:
        """Zero moments, no step done."""
        for local in self._locals.values():
            self._torch.state[local] = {
                "step": torch.zeros((), dtype=torch.float32, device=local.device),
                **{moment: torch.zeros_like(local) for moment in MOMENTS},
            }

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Clip, step, forget the gradients.

        Returns:
            the global gradient norm before clipping.
        """
        gradients = {name: local_part(p.grad) for name, p in self._parameters.items() if p.grad is not None}
        norm = self._norm(gradients)
        scale = min(1.0, self.spec.clip_norm / max(norm, 1e-12))
        for name, local in self._locals.items():
            gradient = gradients.get(name)
            local.grad = torch.zeros_like(local) if gradient is None else gradient.to(local.dtype).mul_(scale)
        for group in self._torch.param_groups:
            group["lr"] = lr
        self._torch.step()
        for name, local in self._locals.items():
            local.grad = self._parameters[name].grad = None
        return norm

    def _norm(self, gradients: Mapping[str, Tensor]) -> float:
        """The L2 norm of all gradients on all ranks; a part that several ranks hold counts once."""
        squares = [
            gradient.float().square().sum(dtype=torch.float64) / copies(self._parameters[name])
            for name, gradient in gradients.items()
        ]
        total = torch.stack(squares).sum()
        if dist.is_initialized():
            dist.all_reduce(total)
        return float(total.sqrt())

    def state(self) -> dict[str, Tensor]:
        """``optimizer.<moment>.<name>`` → moments as they lie on the mesh, and ``optimizer.step``: what is saved."""
        first = next(iter(self._locals.values()))
        found = {"optimizer.step": self._torch.state[first]["step"]}
        for name, local in self._locals.items():
            for moment in MOMENTS:
                value = self._torch.state[local][moment]
                found[f"optimizer.{moment}.{name}"] = _like(self._parameters[name], value)
        return found

    def took(self, step: Tensor) -> None:
        """The moments of :meth:`state` were read anew, and so many steps had been done."""
        for local in self._locals.values():
            self._torch.state[local]["step"].copy_(step)


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return value
    return DTensor.from_local(
        value, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape,
        stride=parameter.stride(),
    )  # fmt: skip
