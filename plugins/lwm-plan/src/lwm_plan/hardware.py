"""Machines by name: what their devices compute, hold and send, each row with its source.

A *device* is what a framework calls one: a TPU v4 chip (its two cores joined, "megacore"), half a TPU7x chip, a GPU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import NoReturn

from lwm_core.errors import UsageError
from lwm_core.registry.catalogue import near_miss

GIB = 2**30
MATRIX_SHARE = 0.75
"""Of the peak, what matrix products reach: MaxText's dense models train at 65% MFU on v5p, transfers included."""
ATTENTION_SHARE = 0.5
"""Of the peak, what attention kernels reach, as the trainers assume when they choose a strategy."""
GPU_USABLE = 0.92
"""Share of a GPU's memory that a program may have: the driver, the context and NCCL's buffers take the rest."""


@dataclass(frozen=True)
class Device:
    """One kind of device.

    Args:
        name: as in a machine's name.
        peak_flops: dense bfloat16 FLOP/s.
        memory: bytes that a program may use.
        memory_bandwidth: bytes a second of its HBM.
        link: bytes a second to a neighbour in one direction: one ICI link of a TPU, all NVLinks of a GPU.
        network: bytes a second and device in one direction beyond ``island`` devices; 0 where links reach all.
        island: devices that ``link`` joins; 0 where it joins all.
        cores: what the number in a machine's name counts of one device (v4-512: 512 cores, 256 devices).
        devices_per_chip: how many of these a chip of a topology is.
        source: where the figures are from.
        matrix_share, attention_share: of the peak, what matrix products and attention reach.
        measured: whether the rates are this machine's own, of the type that is computed with, told by a file.
    """

    name: str
    peak_flops: float
    memory: float
    memory_bandwidth: float
    link: float
    network: float
    island: int
    cores: float
    devices_per_chip: int
    source: str
    matrix_share: float = MATRIX_SHARE
    attention_share: float = ATTENTION_SHARE
    measured: bool = False

    @property
    def both_ways(self) -> float:
        """Bytes a second that a collective over a torus axis moves: a ring in both directions; a GPU has one way."""
        return self.link if self.island else 2 * self.link


_TPU = "docs.cloud.google.com/tpu/docs/"
_ICI = "; a link by jax-ml.github.io/scaling-book/tpus"
_COMPILER = "; usable memory by libtpu's compiler (docs/benchmarks/aot.json)"
_GPU = "nvidia.com/en-us/data-center/{}: data sheet (SXM, dense); network: an adapter of {} Gb/s a GPU"

DEVICES: dict[str, Device] = {
    one.name: one
    for one in (
        Device("v4", 275e12, 33_017_561_088, 1228e9, 45e9, 0, 0, 2, 1, f"{_TPU}v4{_ICI}{_COMPILER}"),
        Device("v5e", 197e12, 15.75 * GIB, 819e9, 45e9, 0, 0, 1, 1, f"{_TPU}v5e{_ICI}; a quarter GiB kept back"),
        Device("v5p", 459e12, 102_800_042_229, 2765e9, 90e9, 0, 0, 2, 1, f"{_TPU}v5p{_ICI}{_COMPILER}"),
        Device("v6e", 918e12, 33_554_432_000, 1638e9, 90e9, 0, 0, 1, 1, f"{_TPU}v6e{_ICI}{_COMPILER}"),
        Device("tpu7x", 1153.5e12, 94.75 * GIB, 3690e9, 100e9, 0, 0, 0.5, 2,
               f"{_TPU}tpu7x, half a chip; a link is 1200 GB/s / 12; 1.25 GiB kept back"),
        Device("a100", 312e12, GPU_USABLE * 80e9, 2039e9, 300e9, 25e9, 8, 1, 1, _GPU.format("a100", 200)),
        Device("h100", 989e12, GPU_USABLE * 80e9, 3350e9, 450e9, 50e9, 8, 1, 1, _GPU.format("h100", 400)),
        Device("h200", 989e12, GPU_USABLE * 141e9, 4800e9, 450e9, 50e9, 8, 1, 1, _GPU.format("h200", 400)),
        Device("b200", 2250e12, GPU_USABLE * 180e9, 8000e9, 900e9, 50e9, 8, 1, 1, _GPU.format("hgx", 400)),
    )
}  # fmt: skip
"""By name. TPUs' numbers in names count cores for v4 and v5p, chips for v5e, v6e and 7x."""

EXAMPLES = ("v4-512", "v5e-256", "v5p-512", "v6e-256", "tpu7x-128", "a100x64", "h100x64", "h200x64", "b200x64")
_NAME = re.compile(r"(?P<kind>[a-z][a-z0-9]*?)(?:(?P<sign>[-x])(?P<count>\d+)|:(?P<torus>\d+(?:x\d+)+))")


@dataclass(frozen=True)
class Machine:
    """So many devices of a kind."""

    name: str
    device: Device
    devices: int

    @property
    def peak_flops(self) -> float:
        """FLOP/s of all devices."""
        return self.devices * self.device.peak_flops

    def with_devices(self, devices: int) -> Machine:
        """The same kind with another number of devices."""
        return Machine(machine_name(self.device, devices), self.device, devices)


def machine_name(device: Device, devices: int) -> str:
    """The name of so many devices: ``v4-512`` for 256 of v4, ``h100x64`` for 64 GPUs, ``2 x mine`` of a file's."""
    if device.measured:
        return f"{devices} x {device.name}"
    return f"{device.name}x{devices}" if device.island else f"{device.name}-{round(devices * device.cores)}"


def read_machine(name: str, option: str = "--hardware") -> Machine:
    """``v4-512``, ``h100x64``, or a TPU's topology as ``lwm aot`` has it, ``v5p:8x8x4``.

    Args:
        name: of the machine.
        option: by which it was given, for errors.

    Raises:
        UsageError: there is no such kind, or the number makes no whole devices.
    """
    text = re.sub(r"^v?7x", "tpu7x", name.strip().lower())
    match = _NAME.fullmatch(text)
    kind = match["kind"] if match else re.split(r"[-x:]", text, maxsplit=1)[0]
    device = DEVICES.get(kind)
    if match is None or device is None or not _written_so(device, match):
        _refuse(option, name, text, device)
    if match["torus"]:
        devices = prod(int(side) for side in match["torus"].split("x")) * device.devices_per_chip
        if not devices:
            _refuse(option, name, text, device)
        return Machine(name, device, devices)
    count = float(int(match["count"])) / device.cores
    if count < 1 or count != int(count):
        raise UsageError(
            f"{option} {name!r}: the number counts cores, {device.cores:g} a device of {device.name}; expected a "
            f"positive multiple of {device.cores:g}"
        )
    return Machine(machine_name(device, int(count)), device, int(count))


def _written_so(device: Device, match: re.Match[str]) -> bool:
    """GPUs are written with x, TPUs with a hyphen or a topology."""
    return match["sign"] == "x" if device.island else match["sign"] == "-" or match["torus"] is not None


def _refuse(option: str, name: str, text: str, device: Device | None) -> NoReturn:
    """Say what was nearly meant."""
    kind = device.name if device else near_miss(re.sub(r"[-x:]\d*$", "", text), DEVICES)
    number = re.search(r"[-x](\d+)$", text)
    example = next((one for one in EXAMPLES if kind and one.startswith(kind)), "")
    if kind and number:
        example = f"{kind}{'x' if DEVICES[kind].island else '-'}{number[1]}"
    near = f"did you mean {example}? Names are like" if example else "expected a name such as"
    raise UsageError(f"{option} {name!r} is unknown; {near} {', '.join(EXAMPLES)}")
