"""What ``--hardware`` and ``--aot`` name: a machine of the table, one that a file describes, or a topology."""

from __future__ import annotations

import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lwm_core.errors import UsageError
from lwm_plan.hardware import ATTENTION_SHARE, MATRIX_SHARE, Device, Machine, read_machine

SUFFIX = ".toml"


class MachineFile(BaseModel):
    """What a machine's file says; rates are those of the type that the model computes with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, description="of the kind of device")
    peak_flops: float = Field(gt=0, description="FLOP/s of one device; MFU is measured against it")
    memory: float = Field(gt=0, description="bytes of a device that a program may use")
    memory_bandwidth: float = Field(gt=0, description="bytes a second between a device and its memory")
    matrix_share: float = Field(MATRIX_SHARE, gt=0, le=1, description="of the peak, what matrix products reach")
    attention_share: float = Field(ATTENTION_SHARE, gt=0, le=1, description="of the peak, what attention reaches")
    devices: int = Field(1, gt=0, description="how many there are")
    link: float | None = Field(
        None, gt=0, description="bytes a second to a neighbour in one direction; several devices need it"
    )
    island: int = Field(0, ge=0, description="devices that `link` joins; 0 where it joins all")
    network: float = Field(0.0, ge=0, description="bytes a second and device beyond an island")
    source: str = Field("a file", description="where the figures are from")


def read_file(path: Path, option: str = "--hardware") -> Machine:
    """The machine that a TOML file describes.

    Raises:
        UsageError: it cannot be read, a key is unknown, missing or out of range, or several devices have no link.
    """
    try:
        found = MachineFile(**tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{option} {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{option} {path}: is no TOML: {error}") from error
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise UsageError(f"{option} {path}: {told}; the keys are {', '.join(MachineFile.model_fields)}") from error
    if found.devices > 1 and found.link is None:
        raise UsageError(f"{option} {path}: link is missing; {found.devices} devices send to each other at some rate")
    if found.island and not found.network:
        raise UsageError(f"{option} {path}: network is missing; beyond islands of {found.island} it is what joins them")
    device = Device(
        found.name, found.peak_flops, found.memory, found.memory_bandwidth, found.link or found.memory_bandwidth,
        found.network, found.island, 1, 1, found.source, found.matrix_share, found.attention_share, measured=True,
    )  # fmt: skip
    return Machine(str(path), device, found.devices)


def read_hardware(name: str) -> Machine:
    """A machine by name, or by a file whose name ends with ``.toml``.

    Raises:
        UsageError: there is no such machine, or the file does not describe one.
    """
    return read_file(Path(name)) if name.endswith(SUFFIX) else read_machine(name)


def read_topology(name: str, hardware: str | None) -> Machine:
    """The machine that ``--aot`` compiles for.

    Args:
        name: a TPU's topology.
        hardware: what ``--hardware`` says, if it was given; it must be the same devices.

    Raises:
        UsageError: it is no topology, or ``hardware`` is another machine.
    """
    if ":" not in name:
        raise UsageError(
            f"--aot {name!r} is no topology; expected a TPU and its torus, such as v4:8x8x4, v5p:8x8x8 or v6e:16x16"
        )
    machine = read_machine(name, "--aot")
    asked = machine if hardware is None else read_hardware(hardware)
    if (asked.device, asked.devices) != (machine.device, machine.devices):
        raise UsageError(
            f"--hardware {hardware} is {asked.devices} x {asked.device.name} and --aot {name} is {machine.devices} x "
            f"{machine.device.name}; leave --hardware out, or name the same devices"
        )
    return machine
