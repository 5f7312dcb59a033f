"""What every start file says: which command, on how many hosts and devices, and where its processes meet."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lwm_core.errors import UsageError
from lwm_core.registry.spec import Framework

Device = Literal["gpu", "tpu", "cpu"]
DEVICES: tuple[Device, ...] = ("gpu", "tpu", "cpu")


@dataclass(frozen=True)
class Launch:
    """A run and the hosts that it is to be started on.

    Args:
        name: of the run.
        run: the words that begin it, ``("lwm", "run", ...)``, with ``--out``, whatever the device.
        out: its folder, on a file system that all hosts see.
        framework: the trainer's; none for a trainer of neither.
        device: what it computes on.
        hosts: how many.
        devices_per_host: as the framework counts devices, which may be two a chip.
        port: free on the first host; the processes meet there.
        grace: seconds that a run has to save in, between being asked to stop and being killed.
        host_devices: the trainer has an option of that name, for how many devices a CPU stands.
    """

    name: str
    run: tuple[str, ...]
    out: str
    framework: Framework | None
    device: Device
    hosts: int
    devices_per_host: int
    port: int
    grace: int
    host_devices: bool

    @property
    def resume(self) -> tuple[str, ...]:
        """The words that continue the run."""
        return ("lwm", "resume", self.out)

    @property
    def processes_per_host(self) -> int:
        """Torch runs a process a device, JAX and others a process a host."""
        return self.devices_per_host if self.framework == "torch" else 1

    @property
    def environment(self) -> dict[str, str]:
        """Variables that are the same for every process and have to do with devices alone."""
        if self.framework == "jax" and self.device == "cpu":
            return self.on_cpu(self.devices_per_host)[0]
        # Else torchrun kills its processes 30 seconds after a SIGTERM; before torch 2.12 it does so in any case.
        return {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(self.grace)} if self.framework == "torch" else {}

    @property
    def begin(self) -> tuple[str, ...]:
        """The words that begin the run on the hosts."""
        on_cpu = self.framework == "jax" and self.device == "cpu"
        return (*self.run, *self.on_cpu(self.devices_per_host)[1]) if on_cpu else self.run

    def on_cpu(self, count: int) -> tuple[dict[str, str], tuple[str, ...]]:
        """Variables and words with which JAX takes the CPU of a process for ``count`` devices."""
        if self.host_devices:  # the option would win over the variable
            return {"JAX_PLATFORMS": "cpu"}, ("-s", f"trainer.host_devices={count}")
        return {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(count)}, ()

    def torchrun(self, endpoint: str | None) -> list[str]:
        """The words before the command: a process for each device of a host, met at ``host:port``; none: alone."""
        count = str(self.devices_per_host)
        if endpoint is None:
            return ["torchrun", "--standalone", "--nproc-per-node", count, "--no-python"]
        return ["torchrun", "--nnodes", str(self.hosts), "--nproc-per-node", count, "--rdzv-backend", "c10d",
                "--rdzv-endpoint", endpoint, "--no-python"]  # fmt: skip


def line(words: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """A shell line that runs ``words`` as they are, under ``environment``."""
    settings = [f"{name}={shlex.quote(value)}" for name, value in (environment or {}).items()]
    return " ".join([*settings, shlex.join(words)])


def plain(what: str, value: str) -> str:
    """``value``, which the file will hold in one line.

    Raises:
        UsageError: it has a line break, a control character, or bytes that are no text.
    """
    if not value.isprintable():
        raise UsageError(f"{what}: {value!r} has characters that a start file cannot hold in one line; leave them out")
    return value
