"""A Python script that starts the command on Ray's hosts."""

from __future__ import annotations

from lwm_core.launch.plan import Launch

_SCRIPT = '''\
"""Starts an LWM run on a Ray cluster: an actor a host, each of which runs one command.

ray job submit --working-dir . -- python start_ray.py, or python start_ray.py on a machine of the cluster.
"""

import os
import signal
import subprocess
import sys

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

HOSTS = {hosts}
RESOURCES = {resources}  # of each host
PORT = {port}  # free on the first of them
OUT = {out}  # on a file system that all hosts see
RUN = {run}
RESUME = {resume}
ENVIRONMENT = {environment}


@ray.remote(max_concurrency=2)  # so that stop() is heard while run() waits
class Host:
    """One host of the run."""

    def __init__(self):
        self.process = None

    def address(self):
        """How the others reach it."""
        return ray.util.get_node_ip_address()

    def has(self, path):
        """Whether it sees a file."""
        return os.path.exists(path)

    def run(self, words, environment):
        """Run the command to its end; its exit code."""
        self.process = subprocess.Popen(words, env={{**os.environ, **environment}})
        return self.process.wait()

    def stop(self):
        """Ask the command to save and end."""
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)


def start(rank, head, words):
    """The words and variables of a host."""
{start}

def main():
    """Start all, wait for all; Ctrl-C and SIGTERM let them save first."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    ray.init()
    group = placement_group([RESOURCES] * HOSTS, strategy="STRICT_SPREAD")
    ray.get(group.ready())
    hosts = [
        Host.options(
            num_cpus=RESOURCES["CPU"],
            num_gpus=RESOURCES.get("GPU", 0),
            resources={{name: count for name, count in RESOURCES.items() if name not in ("CPU", "GPU")}},
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=rank
            ),
        ).remote()
        for rank in range(HOSTS)
    ]
    head = ray.get(hosts[0].address.remote())
    words = RESUME if ray.get(hosts[0].has.remote(os.path.join(OUT, "run.json"))) else RUN
    running = [host.run.remote(*start(rank, head, words)) for rank, host in enumerate(hosts)]
    try:
        codes = ray.get(running)
    except KeyboardInterrupt:
        ray.get([host.stop.remote() for host in hosts])
        codes = ray.get(running)
    remove_placement_group(group)
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
'''

_TORCH = """\
    torchrun = [
        "torchrun", "--nnodes", str(HOSTS), "--nproc-per-node", {count}, "--rdzv-backend", "c10d",
        "--rdzv-endpoint", f"{{head}}:{{PORT}}", "--rdzv-conf", f"is_host={{int(rank == 0)}}", "--no-python",
    ]
    return [*torchrun, *words], ENVIRONMENT
"""

_JAX = """\
    place = {"RANK": str(rank), "WORLD_SIZE": str(HOSTS), "JAX_COORDINATOR_ADDRESS": f"{head}:{PORT}"}
    return words, {**ENVIRONMENT, **place}
"""

_OTHER = """\
    place = {"RANK": str(rank), "WORLD_SIZE": str(HOSTS), "MASTER_ADDR": head, "MASTER_PORT": str(PORT)}
    return words, {**ENVIRONMENT, **place}
"""


def files(launch: Launch) -> dict[str, str]:
    """The script by name."""
    devices = {} if launch.device == "cpu" else {launch.device.upper(): launch.devices_per_host}
    start = {"torch": _TORCH.format(count=repr(str(launch.devices_per_host))), "jax": _JAX}
    text = _SCRIPT.format(
        hosts=launch.hosts,
        resources=repr({"CPU": 1, **devices}),
        port=launch.port,
        out=repr(launch.out),
        run=repr(list(launch.begin)),
        resume=repr(list(launch.resume)),
        environment=repr(launch.environment),
        start=start.get(launch.framework or "", _OTHER),
    )
    return {"start_ray.py": text}
