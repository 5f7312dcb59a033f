"""``lwm launch``: what it prints is whole, quoted, and starts the run; what does not fit is refused."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lwm_core.launch import Launch, gke, ray, slurm, torchrun
from lwm_core.protocols import Stage
from lwm_core.rope import RopeSpec

Write = Callable[..., Path]

HOSTILE = "a b'c\"d$(touch pwned)`touch pwned`$$HOME$(WORLD_SIZE)\\;é&|*!"
KINDS = ("torchrun", "slurm", "gke", "ray")
CLUSTER = gke.Cluster("repo/image:tag", "tpu-v5p-slice", "4x4x4", "runs")


def make(framework: Any = "jax", device: Any = "gpu", hosts: int = 2, each: int = 4, out: str = "/runs/r") -> Launch:
    run = ("lwm", "run", HOSTILE, "-s", f"a={HOSTILE}", "--out", out)
    return Launch("my.Run", run, out, framework, device, hosts, each, 29500, 120, host_devices=False)


def stage(mesh: str, rows: int = 8) -> Stage:
    return Stage(name="s", seq_len=8, rope=RopeSpec(1e4), tokens=8 * rows, batch_tokens=8 * rows, lr=1.0, min_lr=0.1,
                 accumulate=1, mesh=mesh)  # fmt: skip


def texts(launch: Launch) -> dict[str, str]:
    return {
        **torchrun.files(launch, "host0", [stage("1,-1,1,1")]), **slurm.files(launch, "1-00:00:00"),
        **gke.files(launch, CLUSTER), **ray.files(launch),
    }  # fmt: skip


def printed(lwm: Any, *words: str) -> dict[str, Any]:
    done = lwm("launch", *words, "--json")
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def kubernetes(text: str, env: dict[str, str]) -> str:
    """``$(NAME)`` and ``$$`` in a container's arguments, by the reference of its API."""
    return re.sub(r"\$\$|\$\(([^)]*)\)", lambda m: "$" if m[0] == "$$" else env.get(m[1], m[0]), text)


def shims(folder: Path, **scripts: str) -> Path:
    """A folder for PATH with shell scripts in it."""
    folder.mkdir(exist_ok=True)
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


def real_lwm() -> str:
    code = "import sys; from lwm_core.cli import main; sys.exit(main())"
    return f'exec {shlex.quote(sys.executable)} -c {shlex.quote(code)} "$@"'


@pytest.mark.parametrize("framework", ["jax", "torch", None])
@pytest.mark.parametrize("device", ["gpu", "cpu", "tpu"])
@pytest.mark.parametrize("hosts", [1, 3])
def test_every_text_has_its_languages_syntax(framework: Any, device: Any, hosts: int) -> None:
    yaml = pytest.importorskip("yaml")
    for name, text in texts(make(framework, device, hosts)).items():
        assert text.endswith("\n")
        if name.endswith(".py"):
            compile(text, name, "exec")
        elif name.endswith(".yaml"):
            job = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]
            assert job["completions"] == job["parallelism"] == hosts
            text = kubernetes(job["template"]["spec"]["containers"][0]["args"][0], {})
        if not name.endswith(".py"):
            done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
            assert (done.returncode, done.stderr) == (0, ""), name


@pytest.mark.parametrize("framework", ["jax", "torch", None])
def test_what_the_user_gave_reaches_the_command_as_it_is(framework: Any, tmp_path: Path) -> None:
    """Each text is executed with stand-ins that write down their words; nothing in them is expanded or run."""
    yaml = pytest.importorskip("yaml")
    out = f"{tmp_path}/{HOSTILE.replace('/', '')}"
    launch = make(framework, hosts=2, out=out)
    tell = f'{shlex.quote(sys.executable)} -c "import json, sys; print(json.dumps(sys.argv[1:]))" "$0" "$@"'
    path = shims(tmp_path / "bin", lwm=tell, torchrun=tell, scontrol="echo first; echo second",
                 srun='while [ "${1:0:2}" = "--" ]; do shift; done; "$@"')  # fmt: skip
    env = {"PATH": f"{path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "x", "SLURM_PROCID": "0", "SLURM_NTASKS": "2",
           "SLURM_JOB_ID": "1", "WORLD_SIZE": "wrong", "JOB_COMPLETION_INDEX": "0"}  # fmt: skip
    made = texts(launch)
    container = yaml.safe_load(made["jobset.yaml"])["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    container = container["containers"][0]
    scripts = {name: made[name] for name in ("hosts.sh", "two-terminals.sh", "job.sbatch")}
    declared = {one["name"]: one.get("value", "0") for one in container.get("env", [])}
    scripts["jobset"] = kubernetes(container["args"][0], declared)
    scope: dict[str, Any] = {}
    body = made["start_ray.py"].partition("@ray.remote")[0].replace("import ray\n", "")
    exec(re.sub(r"^from ray.*$", "", body, flags=re.MULTILINE), scope)
    assert tuple(scope["RUN"]) == launch.run and scope["OUT"] == out and tuple(scope["RESUME"]) == launch.resume
    for begun in (False, True):
        if begun:
            (tmp_path / HOSTILE).mkdir()
            (tmp_path / HOSTILE / "run.json").touch()
        for name, script in scripts.items():
            done = subprocess.run(["bash", "-c", script], env=env, cwd=tmp_path, text=True, capture_output=True,
                                  check=True)  # fmt: skip
            wanted = launch.resume if begun and not name.endswith(".sh") else launch.run
            for told in map(json.loads, done.stdout.splitlines()):
                assert Path(told[0]).name in ("lwm", "torchrun")
                assert tuple(told[-len(wanted) + 1 :]) == wanted[1:], name
    assert not (tmp_path / "pwned").exists()


def test_the_numbers_in_a_jobset() -> None:
    """A v5p slice of 4 x 4 x 4 chips is 16 hosts of 4 chips, met at the first pod's name."""
    yaml = pytest.importorskip("yaml")
    hosts, each = gke.tpu_hosts("tpu-v5p-slice", "4x4x4", None, None)
    assert (hosts, each) == (16, 4)
    whole = yaml.safe_load(gke.files(make("jax", "tpu", hosts, each), CLUSTER)["jobset.yaml"])
    assert (whole["apiVersion"], whole["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert whole["metadata"]["name"] == "my-run" and whole["spec"]["network"]["enableDNSHostnames"] is True
    pod = whole["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice", "cloud.google.com/gke-tpu-topology": "4x4x4"
    }  # fmt: skip
    box = pod["containers"][0]
    assert box["resources"]["limits"] == {"google.com/tpu": 4} and pod["terminationGracePeriodSeconds"] == 120
    env = {one["name"]: one.get("value") for one in box["env"]}
    assert env == {"WORLD_SIZE": "16", "JAX_COORDINATOR_ADDRESS": "my-run-hosts-0-0.my-run:29500", "RANK": None}
    assert [one["name"] for one in box["volumeMounts"]] == [one["name"] for one in pod["volumes"]] == ["runs"]
    nvidia = gke.files(make("torch", "gpu", 2, 8), gke.Cluster("i", "nvidia-h100-80gb", None, "runs"))["jobset.yaml"]
    pod = yaml.safe_load(nvidia)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert {"name": "shm", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]


@pytest.mark.parametrize(
    ("label", "topology", "each", "wanted"),
    [("tpu7x", "2x2x2", None, (2, 8)), ("tpu-v6e-slice", "1x1", None, (1, 1)), ("tpu-v6e-slice", "2x4", 8, (1, 8))],
)
def test_devices_of_a_slice(label: str, topology: str, each: int | None, wanted: tuple[int, int]) -> None:
    """tpu7x has two devices a chip; a v6e host may have one, four or eight chips."""
    assert gke.tpu_hosts(label, topology, each, None) == wanted


@pytest.mark.parametrize(("name", "wanted"), [("a.B_c", "a-b-c"), ("3x", "run-3x"), ("x" * 60, "x" * 40), ("a-", "a")])
def test_a_runs_name_as_kubernetes_takes_it(name: str, wanted: str) -> None:
    assert gke._name(name) == wanted and re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", wanted)


DOCUMENTED = {"init", "get", "remote", "util.get_node_ip_address"}
IMPORTED = {
    ("ray.util.placement_group", "placement_group"), ("ray.util.placement_group", "remove_placement_group"),
    ("ray.util.scheduling_strategies", "PlacementGroupSchedulingStrategy"),
}  # fmt: skip


@pytest.mark.parametrize("framework", ["jax", "torch", None])
def test_the_ray_script_uses_what_rays_reference_documents(framework: Any) -> None:
    tree = ast.parse(ray.files(make(framework))["start_ray.py"])
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    chains = {one.removeprefix("ray.") for one in used if one.startswith("ray.") and "(" not in one}
    assert chains - {"util"} == DOCUMENTED
    imports = {(node.module, one.name) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
               for one in node.names}  # fmt: skip
    assert imports == IMPORTED


def test_torchruns_line() -> None:
    launch = make("torch", hosts=3, each=8)
    text = torchrun.files(launch, "n0", [stage("1,-1,1,1", 24)])["hosts.sh"]
    lines = [one for one in text.splitlines() if one[0] != "#"]
    assert len(lines) == 1
    words = shlex.split(lines[0])
    assert words[:12] == [
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=120", "torchrun", "--nnodes", "3", "--nproc-per-node", "8", "--rdzv-backend",
        "c10d", "--rdzv-endpoint", "n0:29500", "--no-python", "lwm",
    ]  # fmt: skip
    assert tuple(words[11:]) == launch.run


def test_two_terminals_are_refused_a_mesh_that_two_cannot_have() -> None:
    text = torchrun.files(make(), "host0", [stage("1,1,1,16")])["two-terminals.sh"]
    assert all(one.startswith("#") for one in text.splitlines()) and "'1,1,1,16' needs 16 devices" in text
    both = torchrun.files(make(), "host0", [stage("1,1,1,4")])["two-terminals.sh"]
    assert both.count("JAX_NUM_CPU_DEVICES=2 ") == 2  # two of two


def test_two_terminals_run(lwm: Any, small: Write, whole_rows: Any, exact_rows: Any, tmp_path: Path) -> None:
    """The printed lines, each in a shell of its own, train what one process trains."""
    path = small()
    made = printed(lwm, path.name, "--print", "torchrun", "--hosts", "2", "--devices-per-host", "1", "--out", "r 2",
                   "-s", "stages.0.mesh=-1,1,1,1", "-s", "stages.1.mesh=-1,1,1,1")  # fmt: skip
    assert (made["kind"], made["hosts"], made["devices_per_host"]) == ("torchrun", 2, 1)
    lines = [one for one in made["files"]["two-terminals.sh"].splitlines() if one and one[0] != "#"]
    assert len(lines) == 2
    env = {**lwm.env, "PATH": f"{shims(tmp_path / 'bin', lwm=real_lwm())}:{os.environ['PATH']}",
           "STANDIN_SOCKET": str(tmp_path / "s")}  # fmt: skip
    terminals = [
        subprocess.Popen(["bash", "-c", one], cwd=lwm.cwd, env=env, text=True, stdout=-1, stderr=-1) for one in lines
    ]
    told = [one.communicate(timeout=60) for one in terminals]
    assert [one.returncode for one in terminals] == [0, 0], told
    assert json.loads((lwm.cwd / "r 2" / "run.json").read_text())["processes"] == 2
    assert exact_rows(lwm.cwd / "r 2") == whole_rows


SRUN = """
while [ "${1:0:2}" = "--" ]; do shift; done
export SLURM_NTASKS=2
SLURM_PROCID=0 "$@" & a=$!
SLURM_PROCID=1 "$@" & b=$!
trap 'kill -TERM $a $b' TERM  # srun hands signals on
wait $a; code=$?
while kill -0 $a 2>/dev/null; do wait $a; code=$?; done
wait $b
exit $code
"""


def test_the_batch_script_saves_before_its_time_is_up_and_goes_on(
    lwm: Any, small: Write, whole_rows: Any, exact_rows: Any, tmp_path: Path
) -> None:
    """Warned by USR1 it saves and queues anew; the next start resumes, ends, and does not queue again."""
    path = small(trainer="step_seconds = 0.1", every=1000)
    made = printed(lwm, path.name, "--print", "slurm", "--hosts", "2", "--devices-per-host", "1", "--out", "r",
                   "-s", "stages.0.mesh=-1,1,1,1", "-s", "stages.1.mesh=-1,1,1,1")  # fmt: skip
    script = lwm.cwd / "job.sbatch"
    script.write_text(made["files"]["job.sbatch"])
    path = shims(tmp_path / "bin", lwm=real_lwm(), srun=SRUN,
                 scontrol='[ "$1" = show ] && echo first || echo "$@" >> requeued')  # fmt: skip
    env = {**lwm.env, "PATH": f"{path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "x", "SLURM_JOB_ID": "7"}
    folder = lwm.cwd / "r"

    def submit(socket: str) -> subprocess.Popen[str]:
        return subprocess.Popen(["bash", str(script)], cwd=lwm.cwd, text=True, stdout=-1, stderr=-1,
                                env={**env, "STANDIN_SOCKET": str(tmp_path / socket)})  # fmt: skip

    job = submit("s1")
    rows = folder / "metrics.jsonl"
    while job.poll() is None and (not rows.exists() or rows.read_bytes().count(b"\n") < 2):
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    out, err = job.communicate(timeout=60)
    assert job.returncode == 143, (out, err)
    assert (lwm.cwd / "requeued").read_text() == "requeue 7\n"
    assert 2 <= len(exact_rows(folder)) < 15 and list(folder.glob("checkpoints/step_*/manifest.json"))
    job = submit("s2")
    out, err = job.communicate(timeout=60)
    assert job.returncode == 0, (out, err)
    assert "continuing r from step_" in err and (lwm.cwd / "requeued").read_text() == "requeue 7\n"
    assert exact_rows(folder) == whole_rows


RAY = """
import os, threading
from concurrent.futures import ThreadPoolExecutor

class Method:
    def __init__(self, actor, name): self.actor, self.name = actor, name
    def remote(self, *words): return self.actor.pool.submit(getattr(self.actor.one, self.name), *words)

class Actor:
    def __init__(self, kind, threads): self.one, self.pool = kind(), ThreadPoolExecutor(threads)
    def __getattr__(self, name): return Method(self, name)

def remote(max_concurrency):
    class Kind:
        def __init__(self, kind): self.kind = kind
        def options(self, num_cpus, num_gpus, resources, scheduling_strategy):
            assert (num_cpus, num_gpus, resources) == (1, 1, {})
            return self
        def remote(self): return Actor(self.kind, max_concurrency)
    return Kind

def init(): pass
def get(one): return [x.result() for x in one] if isinstance(one, list) else one.result()
"""
"""As much of Ray as the script needs, its actors threads of one process."""


def test_the_ray_script_starts_stops_and_continues(
    lwm: Any, small: Write, whole_rows: Any, exact_rows: Any, tmp_path: Path
) -> None:
    """Over a stand-in for Ray: SIGTERM to the script stops both hosts with a checkpoint, a second start resumes."""
    made = printed(lwm, small(trainer="step_seconds = 0.1", every=1000).name, "--print", "ray", "--hosts", "2",
                   "--devices-per-host", "1", "--out", "r", "-s", "stages.0.mesh=-1,1,1,1", "-s",
                   "stages.1.mesh=-1,1,1,1")  # fmt: skip
    script = lwm.cwd / "start_ray.py"
    script.write_text(made["files"]["start_ray.py"])
    package = tmp_path / "fake" / "ray" / "util"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text(RAY + "import ray.util\n")
    (package / "__init__.py").write_text("def get_node_ip_address(): return '127.0.0.1'\n")
    (package / "placement_group.py").write_text(
        "from concurrent.futures import Future\n"
        "class Group:\n    def ready(self):\n        one = Future()\n        one.set_result(0)\n        return one\n"
        "def placement_group(bundles, strategy):\n"
        "    assert (bundles, strategy) == ([{'CPU': 1, 'GPU': 1}] * 2, 'STRICT_SPREAD')\n    return Group()\n"
        "def remove_placement_group(group): pass\n"
    )
    (package / "scheduling_strategies.py").write_text(
        "def PlacementGroupSchedulingStrategy(placement_group, placement_group_bundle_index): pass\n"
    )
    env = {**lwm.env, "PATH": f"{shims(tmp_path / 'bin', lwm=real_lwm())}:{os.environ['PATH']}",
           "PYTHONPATH": f"{tmp_path / 'fake'}:{lwm.env['PYTHONPATH']}"}  # fmt: skip

    def start(socket: str) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, str(script)], cwd=lwm.cwd, text=True, stdout=-1, stderr=-1,
                                env={**env, "STANDIN_SOCKET": str(tmp_path / socket)})  # fmt: skip

    driver, rows = start("s1"), lwm.cwd / "r" / "metrics.jsonl"
    while driver.poll() is None and (not rows.exists() or rows.read_bytes().count(b"\n") < 2):
        time.sleep(0.01)
    driver.send_signal(signal.SIGTERM)
    told = driver.communicate(timeout=60)
    assert driver.returncode == 143 and "Traceback" not in told[1], told
    assert 2 <= len(exact_rows(lwm.cwd / "r")) < 15
    driver = start("s2")
    told = driver.communicate(timeout=60)
    assert driver.returncode == 0 and "continuing r from step_" in told[1], told
    assert exact_rows(lwm.cwd / "r") == whole_rows


@pytest.fixture
def whole_rows(lwm: Any, small: Write, exact_rows: Any) -> Any:
    """What one process's metrics say."""
    done = lwm("run", str(small()), "--out", "alone")
    assert done.returncode == 0, done.stderr
    return exact_rows(lwm.cwd / "alone")


@pytest.mark.parametrize("kind", KINDS)
def test_a_mesh_that_does_not_fit_is_refused(lwm: Any, small: Write, kind: str) -> None:
    done = lwm("launch", str(small()), "--print", kind, "--hosts", "2", "--devices-per-host", "8", "--image", "i",
               "--out", "/runs/r", "-s", "stages.0.mesh=1,1,1,-1", "-s", "stages.1.mesh=1,1,2,4")  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: stage 'long' on 2 hosts × 8 devices: mesh '1,1,2,4' needs 8 devices, but 16")
    assert done.stderr.count("\n") == 1
    rows = lwm("launch", str(small()), "--print", kind, "--hosts", "1", "--devices-per-host", "4", "--image", "i",
               "--out", "/runs/r", "-s", "stages.0.mesh=1,4,1,1").stderr  # fmt: skip
    assert rows.startswith("error: stage 'short' on 1 host × 4 devices: mesh '1,4,1,1': 2 rows a step")


TPU = ("--print", "gke", "--image", "i", "--device", "tpu", "--accelerator")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--print", "gke"), "--image is missing"),
        (("--print", "gke", "--image", "i"), "expected an absolute path"),
        (("--print", "gke", "--image", "i", "--out", "/r"), "expected an absolute path below"),
        (("--print", "gke", "--image", "i\nj"), "--image: 'i\\nj' has characters"),
        (("--print", "gke", "--image", "i", "--device", "tpu"), "--accelerator and --topology are missing"),
        ((*TPU, "t", "--topology", "4"), "'4': expected chips"),
        ((*TPU, "t", "--topology", "4x4", "--hosts", "3"), "16 chips are 4 hosts × 4 devices, but --hosts is 3"),
        ((*TPU, "tpu7x", "--topology", "2x2", "--devices-per-host", "3"), "8 devices, which hosts of 3 do not share"),
        (("--print", "slurm", "--time", "1; rm"), "--time '1; rm': expected"),
        (("--print", "ray", "--out", "gs://b/r"), "not an address"),
        (("--print", "ray", "-s", "summary='a\u2028b'"), "-s: \"summary='a\\u2028b'\" has characters"),
        (("--print", "mpi"), "invalid choice"),
        (("--print", "ray", "--hosts", "0"), "invalid whole number above 0 value: '0'"),
        ((), "--print"),
    ],
)  # fmt: skip
def test_wrong_use(lwm: Any, small: Write, words: tuple[str, ...], part: str) -> None:
    done = lwm("launch", str(small()), "-s", "stages.0.mesh=1,1,1,-1", "-s", "stages.1.mesh=1,1,1,-1", *words)
    assert done.returncode == 2 and part in done.stderr and "Traceback" not in done.stderr and done.stdout == ""


def test_a_trainers_devices_are_heeded_and_no_framework_is_loaded(lwm: Any) -> None:
    """With the real trainer ``jax``, named by its metadata alone: the start file is printed and JAX never imported."""
    pytest.importorskip("lwm_jax_ring")
    code = (
        "import sys; from lwm_core.cli import main; code = main(); "
        "heavy = {'jax', 'torch', 'flax', 'lwm_core.launch'} & set(sys.modules); print(sorted(heavy)); sys.exit(code)"
    )
    words = ["launch", "first-run", "--print", "ray", "--hosts", "2", "--devices-per-host", "1", "-s",
             "stages.0.mesh=1,-1,1,1", "-s", "stages.1.mesh=1,-1,1,1", "--device"]  # fmt: skip
    env = {**lwm.env, "LWM_PLUGINS": "lwm-jax-ring"}
    for device, resource in (("tpu", "'TPU': 1"), ("cpu", "trainer.host_devices=1")):
        done = subprocess.run([sys.executable, "-c", code, *words, device], env=env, text=True, capture_output=True,
                              check=False)  # fmt: skip
        assert done.returncode == 0 and done.stdout.endswith("['lwm_core.launch']\n"), done.stderr
        assert resource in done.stdout and "JAX_COORDINATOR_ADDRESS" in done.stdout
    done = subprocess.run([sys.executable, "-c", code, "--help"], env=env, text=True, capture_output=True, check=False)
    assert "lwm_core.launch" not in done.stdout
