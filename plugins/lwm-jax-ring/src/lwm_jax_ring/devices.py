"""How many devices JAX sees, and how fast they could be. On a CPU the host can stand for several devices."""

from __future__ import annotations

import time
from contextlib import suppress
from functools import cache

import jax
import jax.numpy as jnp

from lwm_core.errors import ShapeError

PEAK_BF16_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}
"""Dense bfloat16 FLOP/s of one device by its kind, from the makers' data sheets."""


def ensure_devices(count: int) -> None:
    """Make the host's CPU stand for ``count`` devices, unless JAX has started already.

    Raises:
        ShapeError: JAX has started with another number of devices than that, or has fewer accelerators.
    """
    with suppress(RuntimeError):  # JAX has started; what it sees is checked below
        jax.config.update("jax_num_cpu_devices", count)
    if len(jax.devices()) < count:
        raise ShapeError(
            f"jax: {count} devices are asked for, but JAX sees {len(jax.devices())}; "
            "ask for no more than there are, and before anything else starts JAX"
        )


@cache
def _measured_cpu_flops(size: int = 1024, repeats: int = 5) -> float:
    """FLOP/s of a float32 matrix product on the whole host: the ceiling that MFU is a share of on a CPU."""
    x = jax.device_put(jnp.ones((size, size), jnp.float32), jax.devices()[0])
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def peak_flops(of_one_device: float | None) -> float | None:
    """Peak FLOP/s of all devices together; None where the chip is unknown and nothing was given."""
    devices = jax.devices()
    if of_one_device is not None:
        return of_one_device * len(devices)
    if devices[0].platform == "cpu":
        return _measured_cpu_flops()
    kind = devices[0].device_kind
    known = [flops for name, flops in PEAK_BF16_FLOPS.items() if kind == name or kind.startswith(f"{name} ")]
    return known[-1] * len(devices) if known else None
