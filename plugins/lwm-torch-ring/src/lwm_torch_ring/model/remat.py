"""What a layer keeps for its backward pass: everything, nothing, or what attention gave, here or in the host's memory.

Attention is one operator of torch (``attention/differentiable.py``), so that a policy can name it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lwm_torch_ring.attention.differentiable import FORWARD

Remat = Literal["none", "full", "attention", "offload", "dots"]
REMATS: tuple[str, ...] = get_args(Remat)


def _attention() -> Any:
    return getattr(torch.ops.lwm_torch_ring, FORWARD.partition("::")[2]).default


def _policy(kept: frozenset[Any], _: Any, operator: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE


class _OnHost:
    """What attention gave in one layer, in the host's memory between its forward pass and its backward pass."""

    def __init__(self) -> None:
        self.kept: list[tuple[tuple[torch.device, Tensor], ...]] = []

    def keep(self, given: tuple[Tensor, ...]) -> None:
        self.kept.append(tuple((x.device, _to_host(x.detach())) for x in given))

    def give(self) -> tuple[Tensor, ...]:
        return tuple(x.to(device, non_blocking=True) for device, x in self.kept.pop(0))


def _to_host(x: Tensor) -> Tensor:
    if x.device.type == "cpu":
        return x.clone()  # the very thing that another memory is asked for
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return host.copy_(x, non_blocking=True)


class _Keeping(TorchDispatchMode):
    def __init__(self, host: _OnHost) -> None:
        super().__init__()
        self._host = host

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        if func is _attention():
            self._host.keep(given)
        return given


class _Giving(TorchDispatchMode):
    def __init__(self, host: _OnHost) -> None:
        super().__init__()
        self._host = host

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._host.give() if func is _attention() else func(*args, **(kwargs or {}))


def _host_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    host = _OnHost()
    return _Keeping(host), _Giving(host)


def rematerialised(layer: Callable[[Tensor], Tensor], remat: Remat, x: Tensor) -> Tensor:
    """``layer(x)``, of which as much is kept for the backward pass as ``remat`` says.

    ``none`` keeps everything, ``full`` only ``x``; ``attention`` also what attention gave, so that a ring never runs
    twice; ``offload`` the same two in the host's memory; ``dots`` all matrix products too.
    """
    if remat == "none" or not torch.is_grad_enabled():
        return layer(x)
    again = partial(checkpoint, layer, x, use_reentrant=False, preserve_rng_state=False)
    if remat == "full":
        result: Tensor = again()
        return result
    if remat == "offload":
        with save_on_cpu(pin_memory=x.device.type == "cuda") if x.device.type != "cpu" else nullcontext():
            result = again(context_fn=_host_contexts)
        return result
    kept = {_attention()}
    if remat == "dots":
        kept |= {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
    policy = partial(_policy, frozenset(kept))
    result = again(context_fn=partial(create_selective_checkpoint_contexts, policy))
    return result
