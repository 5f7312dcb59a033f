"""A batch script for Slurm's ``sbatch``."""

from __future__ import annotations

import re
import shlex

from lwm_core.errors import UsageError
from lwm_core.launch.plan import Launch

TIME = re.compile(r"\d+(-\d+(:\d+){0,2}|(:\d+){0,2})")
"""``minutes``, ``minutes:seconds``, ``hours:minutes:seconds``, and days before any hours."""


def files(launch: Launch, time: str) -> dict[str, str]:
    """The script by name; it may run for ``time``, and queues itself anew until the run is done.

    Raises:
        UsageError: Slurm does not know such a time.
    """
    if TIME.fullmatch(time) is None:
        raise UsageError(f"--time {time!r}: expected minutes, hours:minutes:seconds or days-hours:minutes:seconds")
    return {"job.sbatch": "\n".join([*_head(launch, time), "", *_choose(launch), "", *_start(launch), ""])}


def _head(launch: Launch, time: str) -> list[str]:
    # USR1, not TERM: a job that is cancelled gets TERM, and must not come back.
    gpus = [f"#SBATCH --gpus-per-node={launch.devices_per_host}"] if launch.device == "gpu" else []
    return [
        "#!/bin/bash",
        "# sbatch job.sbatch starts the run, and starts it again where its time ends before it does. Add what your",
        "# site asks for: partition, account, modules, a container. Files must lie where all hosts see them.",
        f"#SBATCH --job-name={launch.name}",
        f"#SBATCH --nodes={launch.hosts}",
        "#SBATCH --ntasks-per-node=1",
        *gpus,
        f"#SBATCH --time={time}",
        f"#SBATCH --signal=B:USR1@{launch.grace}",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --output=%x-%j.out",
    ]


def _choose(launch: Launch) -> list[str]:
    marker = shlex.quote(f"{launch.out.rstrip('/')}/run.json")
    return [
        "set -u",
        f"if [ -e {marker} ]; then",
        f"  run=({shlex.join(launch.resume)})",
        "else",
        f"  run=({shlex.join(launch.begin)})",
        "fi",
    ]


def _start(launch: Launch) -> list[str]:
    exports = [f"export {name}={shlex.quote(value)}" for name, value in launch.environment.items()]
    endpoint = f'"$head:{launch.port}"'
    if launch.framework == "torch":
        words = shlex.join(launch.torchrun("ENDPOINT")).replace("ENDPOINT", endpoint)
        task = f'{words} "${{run[@]}}"'
    else:
        task = 'bash -c \'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS exec "$@"\' task "${run[@]}"'
        if launch.framework == "jax":
            exports.append(f"export JAX_COORDINATOR_ADDRESS={endpoint}")
        else:
            exports += ['export MASTER_ADDR="$head"', f"export MASTER_PORT={launch.port}"]
    if launch.framework == "jax" and launch.device == "gpu":
        # Under Slurm JAX takes one GPU a task, unless it is told.
        exports.append(f"export JAX_LOCAL_DEVICE_IDS={','.join(map(str, range(launch.devices_per_host)))}")
    return [
        'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        *exports,
        "",
        "# A host's output goes to a file of its own. A rank that ends does not end the others: they may still be",
        "# saving, and find out for themselves where one has died.",
        "srun --kill-on-bad-exit=0 --output=%x-%j-%t.log \\",
        f"  {task} &",
        "step=$!",
        "again=",
        f"# {launch.grace} seconds before the time is up: save after this step, and queue anew.",
        "trap 'again=yes; kill -TERM \"$step\"' USR1",
        'wait "$step"',
        "code=$?",
        'while kill -0 "$step" 2>/dev/null; do',
        '  wait "$step"',
        "  code=$?",
        "done",
        'if [ -n "$again" ] && [ "$code" -ne 0 ]; then',
        '  scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        'exit "$code"',
    ]
