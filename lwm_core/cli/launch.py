"""``lwm launch RECIPE|FILE --print slurm|gke|ray|torchrun``: print a file that starts the run on several hosts.

The file is yours to edit and to submit; nothing is started here. A mesh that does not fit the hosts is refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from lwm_core.cli.overrides import add_overrides

if TYPE_CHECKING:
    from lwm_core.launch import Device, Launch
    from lwm_core.pipeline import Pipeline
    from lwm_core.registry import PluginSpec

KINDS = ("slurm", "gke", "ray", "torchrun")
GPUS, CHIPS = 8, 4


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the ``lwm`` command."""
    parser = subparsers.add_parser(
        "launch", help="print a file that starts a run on several hosts", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("source", metavar="RECIPE|FILE", help="the name of a recipe (lwm recipes), or a .toml file")
    add_overrides(parser)
    parser.add_argument(
        "--print", dest="kind", required=True, choices=KINDS,
        help="what starts the processes: Slurm's sbatch, a JobSet on GKE, Ray, or lines typed on each host",
    )  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="folder of the run, on a file system that all hosts see")
    parser.add_argument("--hosts", metavar="N", type=_positive, help="hosts (default: 1, or those of --topology)")
    parser.add_argument(
        "--devices-per-host", metavar="M", type=_positive,
        help=f"devices of a host, as the mesh counts them (default: {GPUS} GPUs, {CHIPS} TPU chips, 1 CPU)",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=("gpu", "tpu", "cpu"), help="what to compute on (default: tpu for JAX on GKE, else gpu)"
    )
    parser.add_argument(
        "--port", metavar="PORT", type=_positive, default=29500, help="free on the first host (default: %(default)s)"
    )
    parser.add_argument(
        "--grace", metavar="SECONDS", type=_positive, default=300,
        help="to save in, between being asked to stop and being killed (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print {kind, hosts, devices_per_host, files}")
    _add_kinds(parser)
    parser.set_defaults(run=run_launch)


def _add_kinds(parser: argparse.ArgumentParser) -> None:
    lines = parser.add_argument_group("torchrun")
    lines.add_argument(
        "--head", metavar="HOST", default="host0", help="the first host as the others reach it (default: %(default)s)"
    )
    slurm = parser.add_argument_group("slurm")
    slurm.add_argument(
        "--time", metavar="TIME", default="24:00:00", help="limit of one start of the job (default: %(default)s)"
    )
    gke = parser.add_argument_group("gke")
    gke.add_argument("--image", metavar="IMAGE", help="the container, with lwm and the run's plugins in it")
    gke.add_argument("--accelerator", metavar="LABEL", help="such as tpu-v5p-slice, tpu-v6e-slice, nvidia-h100-80gb")
    gke.add_argument("--topology", metavar="AxBxC", help="chips of the TPU slice along its axes, such as 4x4x4")
    gke.add_argument(
        "--claim", metavar="NAME", default="runs",
        help="the PersistentVolumeClaim that is mounted above the run's folder (default: %(default)s)",
    )  # fmt: skip


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


_positive.__name__ = "whole number above 0"  # what argparse calls it when it refuses a value


def run_launch(args: argparse.Namespace) -> int:
    """Build the stages, hold them against the hosts, print."""
    import json
    import sys

    from lwm_core.config import load_config
    from lwm_core.launch import check_fit
    from lwm_core.pipeline import build
    from lwm_core.registry import Registry

    loaded = load_config(args.source, args.overrides)
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
    config = loaded.config
    pipeline = build(loaded, Registry.from_environment(config.plugins.allow, config.plugins.deny))
    launch = _launch(args, pipeline)
    check_fit(pipeline.stages, launch.hosts, launch.devices_per_host)
    files = _writer(args, pipeline)(launch)
    if args.json:
        print(json.dumps({"kind": args.kind, "hosts": launch.hosts, "devices_per_host": launch.devices_per_host,
                          "files": files}, indent=2))  # fmt: skip
        return 0
    print("\n".join(files.values()), end="")
    return 0


def _launch(args: argparse.Namespace, pipeline: Pipeline) -> Launch:
    """What the options and the configuration come to.

    Raises:
        UsageError: an option is missing, or the trainer has no use for the device.
    """
    from lwm_core.errors import UsageError
    from lwm_core.launch import Launch, plain

    config = pipeline.loaded.config
    out = args.out or config.run.out or f"runs/{config.name}"
    named = {"RECIPE|FILE": args.source, "--out": out, "--head": args.head, "--claim": args.claim,
             "--image": args.image or "", "--accelerator": args.accelerator or ""}  # fmt: skip
    for what, value in [*named.items(), *(("-s", one) for one in args.overrides)]:
        plain(what, value)
    if "://" in out:
        raise UsageError(f"--out {out!r}: expected a folder on a file system that all hosts see, not an address")
    words = [word for one in args.overrides for word in ("-s", one)]
    device, hosts, each = _hosts(args, pipeline.selection.trainer.choice.spec)
    trainer = pipeline.selection.trainer
    return Launch(
        name=config.name, run=("lwm", "run", args.source, *words, "--out", out), out=out,
        framework=trainer.choice.spec.framework, device=device, hosts=hosts, devices_per_host=each,
        port=args.port, grace=args.grace, host_devices="host_devices" in type(trainer.options).model_fields,
    )  # fmt: skip


def _hosts(args: argparse.Namespace, trainer: PluginSpec) -> tuple[Device, int, int]:
    """Device, hosts, and devices of each."""
    from lwm_core.errors import UsageError
    from lwm_core.launch.gke import tpu_hosts

    device: Device = args.device or ("tpu" if args.kind == "gke" and trainer.framework == "jax" else "gpu")
    if trainer.devices and device not in trainer.devices:
        raise UsageError(f"--device {device}: trainer {trainer.name!r} runs on {', '.join(trainer.devices)}; name one")
    if args.kind == "gke" and args.image is None:
        raise UsageError("--print gke: --image is missing; name a container image with lwm and the run's plugins in it")
    if args.kind == "gke" and device == "tpu":
        if args.accelerator is None or args.topology is None:
            raise UsageError(
                "--print gke: --accelerator and --topology are missing; name the slice, such as --accelerator "
                "tpu-v5p-slice --topology 4x4x4, or say --device gpu"
            )
        return device, *tpu_hosts(args.accelerator, args.topology, args.devices_per_host, args.hosts)
    each = {"gpu": GPUS, "tpu": CHIPS, "cpu": 1}[device]
    return device, args.hosts or 1, args.devices_per_host or each


def _writer(args: argparse.Namespace, pipeline: Pipeline) -> Callable[[Launch], dict[str, str]]:
    """What writes the files of the kind that is asked for."""
    from lwm_core.launch import gke, ray, slurm, torchrun

    if args.kind == "torchrun":
        return lambda launch: torchrun.files(launch, args.head, pipeline.stages)
    if args.kind == "slurm":
        return lambda launch: slurm.files(launch, args.time)
    if args.kind == "ray":
        return ray.files
    cluster = gke.Cluster(args.image, args.accelerator, args.topology, args.claim)
    return lambda launch: gke.files(launch, cluster)
