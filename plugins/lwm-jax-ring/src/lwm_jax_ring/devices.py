"""How many devices JAX sees, and how fast they could be. On a CPU the host can stand for several devices."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp

from lwm_core.attention_cost import MachineRates
from lwm_core.errors import ShapeError, UnsupportedError


@dataclass(frozen=True)
class DeviceRates:
    """What one device does, by its maker's data sheet.

    Args:
        peak_flops: dense bfloat16 FLOP/s.
        bandwidth: bytes a second to a neighbour in one direction: one ICI link of a TPU, all NVLinks of a GPU.
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
    "TPU v4": DeviceRates(275e12, 45e9, 32e9),
    "TPU v5 lite": DeviceRates(197e12, 45e9, 16e9),
    "TPU v5": DeviceRates(459e12, 90e9, 95e9),
    "TPU v5p": DeviceRates(459e12, 90e9, 95e9),
    "TPU v6 lite": DeviceRates(918e12, 90e9, 32e9),
    "TPU7x": DeviceRates(1153.5e12, 100e9, 96e9),  # half a chip
    "NVIDIA A100": DeviceRates(312e12, 300e9, 80e9),
    "NVIDIA H100": DeviceRates(989e12, 450e9, 80e9),
    "NVIDIA H200": DeviceRates(989e12, 450e9, 141e9),
}
"""By ``device_kind``, or its beginning."""

_agreed_cpu_flops: list[float] = []
"""What :func:`agree_on_cpu` was told last."""

HOST_BANDWIDTH = 8e9
"""Bytes a second that all devices of a host's CPU copy between them; an assumption."""


def ensure_devices(count: int) -> None:
    """Make the host's CPU stand for ``count`` devices, unless JAX has started already.

    Raises:
        ShapeError: JAX has started with another number of devices than that, or has fewer accelerators.
    """
    with suppress(RuntimeError):  # JAX has started; what it sees is checked below
        jax.config.update("jax_num_cpu_devices", count)
    if len(jax.local_devices()) < count:
        raise ShapeError(
            f"jax: {count} devices are asked for, but JAX sees {len(jax.local_devices())}; "
            "ask for no more than there are, and before anything else starts JAX"
        )


@cache
def _measured_cpu_flops(size: int = 1024, repeats: int = 5) -> float:
    """FLOP/s of a float32 matrix product on the whole host: the ceiling that MFU is a share of on a CPU."""
    x = jax.device_put(jnp.ones((size, size), jnp.float32), jax.local_devices()[0])
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def cpu_flops() -> float:
    """FLOP/s of all hosts whose CPUs stand for devices."""
    return _agreed_cpu_flops[-1] if _agreed_cpu_flops else _measured_cpu_flops()


def agree_on_cpu(share: Callable[[float | None], float], speaks: bool, hosts: int) -> None:
    """Let processes, each of which would measure something else, take the same of all hosts together.

    Args:
        share: gives every process what the one that ``speaks`` has measured while the others wait.
        hosts: that the processes are on.
    """
    _agreed_cpu_flops.append(hosts * share(_measured_cpu_flops() if speaks else None))


def peak_flops(of_one_device: float | None) -> float | None:
    """Peak FLOP/s of all devices together; None where the chip is unknown and nothing was given."""
    devices = jax.devices()
    if of_one_device is not None:
        return of_one_device * len(devices)
    if devices[0].platform == "cpu":
        return cpu_flops()
    kind = devices[0].device_kind
    known = _known(kind)
    return known.peak_flops * len(devices) if known else None


def _known(kind: str) -> DeviceRates | None:
    found = [rates for name, rates in DEVICES.items() if kind == name or kind.startswith(f"{name} ")]
    return found[-1] if found else None


def device_rates(device: jax.Device, count: int) -> DeviceRates:
    """The rates of ``device``; ``count`` devices of CPUs share their hosts'.

    Raises:
        UnsupportedError: its kind is not in :data:`DEVICES`.
    """
    if device.platform == "cpu":
        return DeviceRates(cpu_flops() / count, HOST_BANDWIDTH / count, None)
    known = _known(device.device_kind)
    if known is None:
        raise UnsupportedError(
            f"jax-ring: strategy 'auto' does not know the rates of {device.device_kind!r}; expected one of "
            f"{', '.join(DEVICES)}; set strategy to ring, usp, ulysses or allgather"
        )
    return known
