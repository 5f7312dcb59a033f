"""How fast the devices could be: by their makers' data sheets, or measured on a CPU."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from lwm_core.attention_cost import MachineRates
from lwm_core.errors import UnsupportedError


@dataclass(frozen=True)
class DeviceRates:
    """What one device does, by its maker's data sheet.

    Args:
        peak_flops: dense bfloat16 FLOP/s.
        bandwidth: bytes a second to a neighbour in one direction: all NVLinks of a GPU.
        memory: bytes; None where devices share the host's.
    """

    peak_flops: float
    bandwidth: float
    memory: float | None

    @property
    def machine(self) -> MachineRates:
        """The rates that a strategy's cost is made of."""
        return MachineRates(ATTENTION_SHARE * self.peak_flops, self.bandwidth)


ATTENTION_SHARE = 0.5
"""Of a device's peak, what attention kernels reach: an assumption that only the choice of a strategy rests on."""

DEVICES = {
    "NVIDIA A100": DeviceRates(312e12, 300e9, 80e9),
    "NVIDIA H100": DeviceRates(989e12, 450e9, 80e9),
    "NVIDIA H200": DeviceRates(989e12, 450e9, 141e9),
    "NVIDIA B200": DeviceRates(2250e12, 900e9, 180e9),
}
"""By the name that torch gives the device, or its beginning."""

HOST_BANDWIDTH = 8e9
"""Bytes a second that all processes on a host's CPU copy between them; an assumption."""


def _measured_cpu_flops(size: int = 1024, repeats: int = 5) -> float:
    """FLOP/s of a float32 matrix product with this process's threads."""
    x = torch.ones(size, size)
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        x @ x
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def _slowest(flops: float) -> float:
    """Of all ranks' FLOP/s: ranks that measured apart would choose apart."""
    told = torch.tensor(flops, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(told, dist.ReduceOp.MIN)
    return float(told)


def device_rates(device: torch.device) -> DeviceRates:
    """The rates of ``device``; processes on a CPU share the host's. On CPUs every rank calls it at the same time.

    Raises:
        UnsupportedError: its name is not in :data:`DEVICES`.
    """
    if device.type == "cpu":
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        return DeviceRates(_slowest(_measured_cpu_flops()), HOST_BANDWIDTH / ranks, None)
    name = torch.cuda.get_device_name(device)
    known = [rates for start, rates in DEVICES.items() if name == start or name.startswith((f"{start} ", f"{start}-"))]
    if not known:
        raise UnsupportedError(
            f"torch-ring: strategy 'auto' does not know the rates of {name!r}; expected one of {', '.join(DEVICES)}; "
            "set strategy to ring, usp, ulysses or allgather"
        )
    return known[-1]


def peak_flops(device: torch.device, ranks: int, of_one_device: float | None) -> float | None:
    """Peak FLOP/s of all ranks together, by this one; None where the GPU is unknown and nothing was given."""
    if of_one_device is not None:
        return of_one_device * ranks
    if device.type == "cpu":
        return _measured_cpu_flops() * ranks
    try:
        return device_rates(device).peak_flops * ranks
    except UnsupportedError:
        return None
