"""A JobSet for GKE: one indexed job whose pods are the hosts, met by the names that JobSet gives them."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import PurePosixPath

from lwm_core.errors import ShapeError, UsageError
from lwm_core.launch.plan import Device, Launch

CHIPS_PER_HOST = 4
"""Chips of a machine in a slice of several hosts, whatever the generation."""

DEVICES_PER_CHIP = {"tpu-v3-device": 2, "tpu-v3-slice": 2, "tpu7x": 2}
"""By GKE's accelerator label; JAX counts one device a chip on all others."""

TOPOLOGY = re.compile(r"[1-9]\d*(x[1-9]\d*){1,2}")
RESTARTS = 5
_NAME_LENGTH = 40  # a pod's name is longer by the job's, the pod's number and a suffix, and may have 63 characters


@dataclass(frozen=True)
class Cluster:
    """What a cluster must be told besides.

    Args:
        image: of the container, with ``lwm`` and the run's plugins in it.
        accelerator: GKE's label of the machines; none: any with GPUs.
        topology: of a TPU slice, as ``4x4x4``; none for GPUs.
        claim: the PersistentVolumeClaim that holds the run's folder; all pods mount it.
    """

    image: str
    accelerator: str | None
    topology: str | None
    claim: str


def tpu_hosts(accelerator: str, topology: str, devices_per_host: int | None, hosts: int | None) -> tuple[int, int]:
    """Hosts, and devices of each, of a TPU slice; what is given must agree with it.

    Raises:
        UsageError: the topology cannot be read.
        ShapeError: hosts or devices are given and are not the slice's.
    """
    if TOPOLOGY.fullmatch(topology) is None:
        raise UsageError(f"--topology {topology!r}: expected chips along two or three axes, such as 4x4 or 4x4x8")
    chips, a_chip = prod(map(int, topology.split("x"))), DEVICES_PER_CHIP.get(accelerator, 1)
    each = min(CHIPS_PER_HOST, chips) * a_chip if devices_per_host is None else devices_per_host
    if chips * a_chip % each or each % a_chip:
        raise ShapeError(
            f"--topology {topology} of {accelerator}: {chips} chips are {chips * a_chip} devices, which hosts "
            f"of {each} do not share out; change --devices-per-host"
        )
    needed = chips * a_chip // each
    if hosts not in (None, needed):
        raise ShapeError(
            f"--topology {topology} of {accelerator}: {chips} chips are {needed} hosts × {each} devices, but --hosts "
            f"is {hosts}; leave --hosts out, or change the topology"
        )
    return needed, each


def files(launch: Launch, cluster: Cluster) -> dict[str, str]:
    """The JobSet by name.

    Raises:
        UsageError: the run's folder is a relative path, for which there is no place on the volume.
    """
    folder = PurePosixPath(launch.out)
    if not folder.is_absolute() or folder.parent == PurePosixPath("/") or ".." in folder.parts:
        raise UsageError(
            f"--out {launch.out!r}: expected an absolute path below the folder where the volume is mounted, such as "
            f"/runs/{launch.name}"
        )
    return {"jobset.yaml": _jobset(launch, cluster, str(folder.parent))}


def _jobset(launch: Launch, cluster: Cluster, mount: str) -> str:
    name = _name(launch.name)
    pod = [*_selector(launch.device, cluster), *_container(launch, cluster, name, mount), *_volumes(launch, cluster)]
    lines = [
        "# kubectl apply -f jobset.yaml starts the run; a restart continues it from its newest checkpoint. Recipes",
        "# that are files, and data, must lie in the image or on the volume.",
        "apiVersion: jobset.x-k8s.io/v1alpha2",
        "kind: JobSet",
        "metadata:",
        f"  name: {name}",
        *_annotations(launch.device),
        "spec:",
        "  network:  # a headless service, so that the pods find each other by name",
        "    enableDNSHostnames: true",
        "    publishNotReadyAddresses: true",
        "  failurePolicy:",
        f"    maxRestarts: {RESTARTS}  # one pod that fails restarts all",
        "  replicatedJobs:",
        "    - name: hosts",
        "      replicas: 1",
        "      template:",
        "        spec:",
        f"          parallelism: {launch.hosts}",
        f"          completions: {launch.hosts}",
        "          completionMode: Indexed",
        "          backoffLimit: 0",
        "          template:",
        "            spec:",
        "              restartPolicy: Never",
        f"              terminationGracePeriodSeconds: {launch.grace}  # to save in, after SIGTERM",
        *(f"              {line}" for line in pod),
    ]
    return "\n".join([*lines, ""])


def _name(name: str) -> str:
    """A run's name as Kubernetes wants it: lower-case words joined by hyphens, a letter first."""
    words = re.sub(r"[^a-z0-9]+", "-", name.lower())[:_NAME_LENGTH].strip("-")
    return words if words[:1].isalpha() else f"run-{words}".rstrip("-")


def _annotations(device: Device) -> list[str]:
    if device != "tpu":
        return []
    return [
        "  annotations:  # a node pool is a slice, and takes one job",
        "    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool",
    ]


def _selector(device: Device, cluster: Cluster) -> list[str]:
    if device == "tpu" and cluster.accelerator is not None and cluster.topology is not None:
        return [
            "nodeSelector:",
            f"  cloud.google.com/gke-tpu-accelerator: {_text(cluster.accelerator)}",
            f"  cloud.google.com/gke-tpu-topology: {_text(cluster.topology)}",
        ]
    if cluster.accelerator is None:
        return []
    return ["nodeSelector:", f"  cloud.google.com/gke-accelerator: {_text(cluster.accelerator)}"]


def _container(launch: Launch, cluster: Cluster, name: str, mount: str) -> list[str]:
    head = f"{name}-hosts-0-0.{name}"
    variables = dict(launch.environment)
    index = []
    if launch.framework != "torch":
        variables["WORLD_SIZE"] = str(launch.hosts)
        if launch.framework == "jax":
            variables["JAX_COORDINATOR_ADDRESS"] = f"{head}:{launch.port}"
        else:
            variables |= {"MASTER_ADDR": head, "MASTER_PORT": str(launch.port)}
        index = [
            "    - name: RANK",
            "      valueFrom:",
            "        fieldRef:",
            "          fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']",
        ]
    pairs = ([f"    - name: {key}", f"      value: {_text(value)}"] for key, value in variables.items())
    settings = list(chain.from_iterable(pairs))
    memory = ["    - name: shm", "      mountPath: /dev/shm"] if launch.device == "gpu" else []
    return [
        "containers:",
        "- name: lwm",
        f"  image: {_text(cluster.image)}",
        *(["  env:", *settings, *index] if settings or index else []),
        "  command: [bash, -c]",
        "  args:  # Kubernetes makes one $ of two",
        "    - |",
        *(f"      {line}" for line in _script(launch, head)),
        *_resources(launch, cluster),
        "  volumeMounts:",
        "    - name: runs",
        f"      mountPath: {_text(mount)}",
        *memory,
    ]  # fmt: skip


def _script(launch: Launch, head: str) -> list[str]:
    marker = _word(f"{launch.out.rstrip('/')}/run.json")
    start = "exec"
    if launch.framework == "torch":
        # Told, not guessed from host names, which a pod has several of.
        words = launch.torchrun(f"{head}:{launch.port}" if launch.hosts > 1 else None)
        start = shlex.join(["exec", *words[:-1]])
        if launch.hosts > 1:
            start += " --rdzv-conf is_host=$$((JOB_COMPLETION_INDEX == 0))"
        start += f" {words[-1]}"
    return [
        f"if [ -e {marker} ]; then",
        f"  set -- {' '.join(map(_word, launch.resume))}",
        "else",
        f"  set -- {' '.join(map(_word, launch.begin))}",
        "fi",
        f'{start} "$@"',
    ]


def _word(word: str) -> str:
    """A word of the shell's; Kubernetes itself reads ``$(...)`` and ``$$`` in arguments, and makes ``$$`` one ``$``."""
    return shlex.quote(word).replace("$", "$$")


def _resources(launch: Launch, cluster: Cluster) -> list[str]:
    if launch.device == "cpu":
        return []
    count, resource = launch.devices_per_host, "nvidia.com/gpu"
    if launch.device == "tpu":
        count, resource = count // DEVICES_PER_CHIP.get(cluster.accelerator or "", 1), "google.com/tpu"
    return ["  resources:", "    limits:", f"      {resource}: {count}"]


def _volumes(launch: Launch, cluster: Cluster) -> list[str]:
    memory = ["- name: shm  # what NCCL passes between processes of a host", "  emptyDir:", "    medium: Memory"]
    return [
        "volumes:",
        "- name: runs",
        "  persistentVolumeClaim:",
        f"    claimName: {_text(cluster.claim)}",
        *(memory if launch.device == "gpu" else []),
    ]


def _text(value: str) -> str:
    """A string of YAML's, which takes JSON's."""
    return json.dumps(value, ensure_ascii=False)
