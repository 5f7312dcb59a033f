"""The processes of a run: joined as ``torchrun`` started them, and what they tell each other beside tensors of a step.

gloo carries what lies on CPUs, NCCL what lies on GPUs.
"""

from __future__ import annotations

import atexit
import json
import os
import shlex
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from lwm_core.errors import UnsupportedError, UsageError
from lwm_torch_ring.train.heartbeat import Heartbeat, naming_the_lost

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """What a launcher tells a process about its place.

    Args:
        rank, world: of all processes.
        local_rank, local_world: of those on this host; 0 where the launcher does not say how many.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int


def launch_from(environment: Mapping[str, str]) -> Launch | None:
    """A process's place, from the variables that ``torchrun`` sets; none where there are none.

    Raises:
        UsageError: some are missing or are no numbers.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return None
    missing = [name for name in LAUNCHED if name not in environment]
    if missing:
        raise UsageError(
            f"trainer 'torch': {' and '.join(missing)} not set, but RANK or WORLD_SIZE is; start with torchrun, "
            "which sets all of them"
        )
    try:
        rank, world, local = (int(environment[name]) for name in LAUNCHED[:3])
        here = int(environment.get("LOCAL_WORLD_SIZE", 0))
    except ValueError as error:
        raise UsageError(f"trainer 'torch': RANK, WORLD_SIZE and LOCAL_RANK: {error}; start with torchrun") from None
    if not (0 <= rank < world and 0 <= local < (here or world)):
        raise UsageError(f"trainer 'torch': RANK {rank} of WORLD_SIZE {world}, LOCAL_RANK {local} of {here}: not so")
    return Launch(rank, world, local, here)


class TorchProcesses:
    """See ``lwm_core.protocols.Processes``."""

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._heart = heartbeat() if self.world > 1 else None

    def share(self, value: Any) -> Any:
        """Rank 0's JSON-able value, on every rank; raises PeerLost."""
        told = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8) if self.rank == 0 else None
        size = torch.tensor([0 if told is None else len(told)])
        with naming_the_lost(self._heart):
            dist.broadcast(size, 0)
            content = torch.zeros(int(size), dtype=torch.uint8) if told is None else told
            dist.broadcast(content, 0)
        return json.loads(content.numpy().tobytes())

    def largest(self, value: int) -> int:
        """The largest of all ranks' values; raises PeerLost."""
        found = torch.tensor([value])
        with naming_the_lost(self._heart):
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)


@cache
def heartbeat() -> Heartbeat:
    """The one heartbeat of this process."""
    return Heartbeat(dist.get_rank(), dist.get_world_size(), os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))


def choose_device(asked: str, local_rank: int) -> torch.device:
    """This rank's device.

    Raises:
        UnsupportedError: CUDA is asked for and torch has none, or has fewer GPUs than ranks on this host.
    """
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UnsupportedError(
            f"trainer 'torch': device 'cuda' is asked for, but torch {torch.__version__} sees no GPU; install a CUDA "
            "build of torch, or set trainer.device to cpu"
        )
    if torch.cuda.device_count() == 1 and "CUDA_VISIBLE_DEVICES" in os.environ:
        local_rank = 0  # the launcher shows each process its own
    if local_rank >= torch.cuda.device_count():
        raise UnsupportedError(
            f"trainer 'torch': local rank {local_rank} has no GPU of its own: there are {torch.cuda.device_count()}; "
            "start one process a GPU"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def join(asked: str, timeout: float) -> torch.device:
    """Join the other processes, if a launcher started some, and give this process's device.

    Raises:
        UsageError: one process was started where there are several GPUs, or the launcher's variables are not whole.
        UnsupportedError: there is no such device, or torch was built without NCCL.
    """
    launch = launch_from(os.environ)
    device = choose_device(asked, 0 if launch is None else launch.local_rank)
    if launch is None:
        count = torch.cuda.device_count() if device.type == "cuda" else 1
        if count > 1:
            raise UsageError(
                f"trainer 'torch': this machine has {count} GPUs, but one process was started; start one for each: "
                f"{torchrun_line(count)}; or choose one with CUDA_VISIBLE_DEVICES=0"
            )
        return device
    if device.type == "cuda" and not dist.is_nccl_available():
        raise UnsupportedError(
            f"trainer 'torch': torch {torch.__version__} is built without NCCL, which GPUs need to talk to each other; "
            "install a build that has it, or set trainer.device to cpu"
        )
    if not dist.is_initialized():
        near = launch.local_world == launch.world or os.environ["MASTER_ADDR"] in ("localhost", "127.0.0.1", "::1")
        if near and "lo" in (name for _, name in socket.if_nameindex()):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo looks this host's name up; it may be unknown
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        if launch.world > 1:
            heartbeat().start()
        atexit.register(_leave)
    return device


def torchrun_line(count: int | str) -> str:
    """The command that starts this very one as ``count`` processes."""
    words = [os.path.basename(sys.argv[0]) or "lwm", *sys.argv[1:]]
    return f"torchrun --nproc-per-node {count} --no-python {shlex.join(words)}"


def _leave() -> None:
    """At the process's end. After a failure groups stay as they are: to end them would be to wait for the others."""
    if not dist.is_initialized():
        return
    alone = dist.get_world_size() == 1
    if not alone:
        heartbeat().stop()
    if alone or not heartbeat().failed:
        dist.destroy_process_group()
