"""What a trainer gives that can compile a stage's step for devices that are not at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from lwm_core.protocols.schedule import Stage


@dataclass(frozen=True)
class Collective:
    """Transfers of one kind and type in a step.

    Args:
        kind: such as ``all-gather``.
        type: dtype and shape of what one device gives or gets, whichever is larger.
        bytes: of one transfer on one device.
        count: transfers a step.
        axes: of the mesh, in its order, along which devices take part; none where the trainer does not know.
        sent: bytes that a device sends in one transfer: n - 1 parts of n of what n devices gather or scatter, twice as
            much of what they sum, and all of what it gives in a permute.
    """

    kind: str
    type: str
    bytes: int
    count: int
    axes: tuple[str, ...] = ()
    sent: int = 0


@dataclass(frozen=True)
class CompiledStep:
    """A training step as the devices' compiler has made it; bytes are those of one device.

    Args:
        topology: as it was asked for.
        devices: how many.
        device_kind: which, by the compiler's name.
        seconds: that the compiler took.
        limit_bytes: memory that a program may use on a device; none where it is not known.
        parameter_bytes: parameters. Gradients are as many bytes again.
        argument_bytes: parameters, optimizer and batch.
        temporary_bytes: what the step needs beside its arguments, gradients among it.
        output_bytes: of results that are not written over arguments.
        code_bytes: the program.
        host_bytes: what is kept in the host's memory for this device.
        collectives: transfers between devices, the most bytes first.
        kernels: hand-written kernels, by how often each runs a step.
        choices: what the trainer was left to choose, and how it chose.
        problem: why it does not fit, in the compiler's words; none where it does.
    """

    topology: str
    devices: int
    device_kind: str
    seconds: float
    limit_bytes: int | None = None
    parameter_bytes: int = 0
    argument_bytes: int = 0
    temporary_bytes: int = 0
    output_bytes: int = 0
    code_bytes: int = 0
    host_bytes: int = 0
    collectives: tuple[Collective, ...] = ()
    kernels: Mapping[str, int] = field(default_factory=dict)
    choices: tuple[str, ...] = ()
    problem: str | None = None

    @property
    def bytes(self) -> int:
        """What the compiler reserves on a device."""
        return self.argument_bytes + self.temporary_bytes + self.output_bytes + self.code_bytes


@runtime_checkable
class CompilesAhead(Protocol):
    """A trainer that can."""

    def compile_ahead(self, stage: Stage, topology: str) -> CompiledStep:
        """Compile the step of ``stage`` for ``topology``; it allocates nothing.

        Raises UsageError for a topology that does not exist, UnsupportedError where the compiler is not installed.
        """
        ...
