"""``quickstart``, ``quickstart_torch``, ``tests``, ``long``, ``kits``, ``aot``, ``lint``, ``wheels``, ``bench``.

``constraints.txt`` pins what they install.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["lint", "tests"]

ROOT = Path(__file__).parent
CONSTRAINTS = ROOT / "constraints.txt"
PLUGINS = sorted(path.parent for kind in ("plugins", "contrib") for path in ROOT.glob(f"{kind}/*/pyproject.toml"))
QUICKSTART = ("plugins/lwm-jax-ring", "plugins/lwm-context", "plugins/lwm-data", "plugins/lwm-evals", "plugins/lwm-hf",
              "plugins/lwm-vqgan", "contrib/lwm-tiny-base")  # fmt: skip
TPU_COMPILER = "libtpu"  # compiles for real TPUs on any machine; it needs none
TEST_TOOLS = ("pytest", "pytest-xdist", "hypothesis", "pyarrow", "entrypoints", "transformers", "diffusers",
              TPU_COMPILER)  # fmt: skip
SIDE_BY_SIDE = ("-n", "auto", "--dist", "loadscope")  # a kit's class stays in one process, with what it has compiled
PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=200"  # a host that stands for 8 devices is slow
ON_CPU = {
    "OMP_NUM_THREADS": "1",  # as many test processes as cores: Torch's threads would spin in each other's way
    "JAX_PLATFORMS": "cpu",  # else every process that imports JAX would load the TPU's compiler
    "XLA_FLAGS": PATIENT,
}
QUICKLY_COMPILED = {"XLA_FLAGS": f"{PATIENT} --xla_backend_optimization_level=0"}  # most programs of a test run once
LINT_TOOLS = ("ruff", "mypy", "import-linter", "pytest")
BENCHMARKS = {
    "attention-cpu": "jax-ring beside PyPI's ringattention: S=8192, float32, causal, on 4 host devices",
    "attention-cpu-torch": "torch-ring on 2 gloo ranks between scaled_dot_product_attention and ring-attention-pytorch",
    "attention-gpu": "kernels of jax-ring on one NVIDIA GPU: a ring of 8 played through against one whole call",
    "attention-gpu-torch": "lwm-torch-ring on one NVIDIA GPU, in parts: rings, documents, a training step, a million",
    "decoding": "both trainers beside transformers: greedy decoding of a small model after a prompt of 4096 tokens",
    "planning": "lwm plan's seconds a step beside the trainer jax's, by this machine's own rates, at four lengths",
    "reading": "both trainers: memory and time of reading and scoring long texts, by length",
    "strategies": "strategies, layouts and documents of jax-ring: blocks, bytes and time on 8 host devices",
}
ON_GPU = {"attention-gpu", "attention-gpu-torch"}
ON_BOTH = {"decoding", "reading"}
WITH_PLAN = {"planning"}
BESIDE_PEER = {"attention-cpu"}
PEER = ("jax==0.4.31", "jaxlib==0.4.31", "flax==0.8.5", "numpy<2.1", "ringattention==0.1.2")
ON_TORCH = {"attention-cpu-torch", "attention-gpu-torch"}
TORCH_PEER = ("ring-attention-pytorch==0.5.20", "einops==0.8.2", "beartype==0.23.1", "jaxtyping==0.3.11")
MAX_CORE_WHEEL = 500_000  # bytes
VENV_BIN = "Scripts" if sys.platform == "win32" else "bin"


def editable(*folders: Path) -> list[str]:
    """pip's arguments that install ``folders`` in place."""
    return [word for folder in folders for word in ("-e", str(folder))]


@nox.session
def quickstart(session: nox.Session) -> None:
    """Extend a small model's context and write the report; goes on where runs/quickstart was left."""
    session.install("-c", str(CONSTRAINTS), *editable(ROOT, *(ROOT / folder for folder in QUICKSTART)))
    out = Path("runs") / "quickstart"
    if (out / "run.json").exists():
        session.run("lwm", "resume", str(out), *session.posargs)
    else:
        session.run("lwm", "run", "quickstart", "--out", str(out), *session.posargs)


@nox.session
def quickstart_torch(session: nox.Session) -> None:
    """The same by the Torch trainer, on two ranks of this machine's CPU or GPUs."""
    plugins = ("plugins/lwm-torch-ring", *QUICKSTART[1:])
    session.install("-c", str(CONSTRAINTS), *editable(ROOT, *(ROOT / folder for folder in plugins)))
    out = Path("runs") / "quickstart-torch"
    words = ["run", "quickstart", "--out", str(out), "-s", "trainer.name=torch", "-s", "attention.name=torch-ring"]
    if (out / "run.json").exists():
        words = ["resume", str(out)]
    launcher = ("torchrun", "--nproc-per-node", "2", "--no-python", "lwm")
    session.run(*launcher, *words, *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def tests(session: nox.Session) -> None:
    """The tests of the repository in one pytest; arguments after ``--`` go to pytest (``-n 0``: in one process)."""
    session.install("-c", str(CONSTRAINTS), *editable(ROOT, *PLUGINS), *TEST_TOOLS)
    # Tests and the processes that they start compile the same programs again and again.
    with tempfile.TemporaryDirectory() as compiled:
        kept = {"JAX_COMPILATION_CACHE_DIR": compiled, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        session.run("pytest", *SIDE_BY_SIDE, *session.posargs, env=ON_CPU | QUICKLY_COMPILED | kept)


@nox.session
def long(session: nox.Session) -> None:
    """The tests that take minutes each, one at a time, for they measure memory."""
    session.install("-c", str(CONSTRAINTS), *editable(ROOT, *PLUGINS), *TEST_TOOLS)
    session.run("pytest", "-m", "long", *session.posargs, env=ON_CPU)


@nox.session
def kits(session: nox.Session) -> None:
    """The conformance kit on every strategy and kernel of our attention at every number of devices; over an hour."""
    backends = [ROOT / "plugins" / name for name in ("lwm-jax-ring", "lwm-torch-ring")]
    session.install("-c", str(CONSTRAINTS), *editable(ROOT, *backends), *TEST_TOOLS)
    tests = [str(test) for backend in backends for test in sorted((backend / "tests").glob("test_*_kits.py"))]
    session.run(
        "pytest", *tests, *SIDE_BY_SIDE, *session.posargs, env=ON_CPU | QUICKLY_COMPILED | {"LWM_KITS": "whole"}
    )


@nox.session
def aot(session: nox.Session) -> None:
    """Everything that is proven by the TPU compiler: tests and the table of LWM's own stages; half an hour.

    Arguments after ``--`` go to the table's script: ``--write`` keeps it under docs/benchmarks, ``--smoke`` is short.
    """
    session.install("-c", str(CONSTRAINTS), *editable(ROOT, *PLUGINS), *TEST_TOOLS)
    session.run("pytest", "-m", "tpu_aot", *([] if "--smoke" not in session.posargs else ["-k", "v5p"]))
    session.run("python", str(ROOT / "tests" / "bench" / "aot.py"), *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff everywhere, mypy --strict on the core, and who may import whom."""
    session.install("-c", str(CONSTRAINTS), *editable(ROOT), *LINT_TOOLS)
    # The contracts read the plugins' source; what the plugins depend on is not imported for that.
    session.install("--no-deps", *editable(*PLUGINS))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("lint-imports")


@nox.session
def wheels(session: nox.Session) -> None:
    """Build all distributions into dist/, then train, be killed and resume with the core's and one trainer's alone.

    ``nox -s wheels -- quickstart`` goes on to install all of them and runs the quickstart.
    """
    session.install("-c", str(CONSTRAINTS), "build", "hatchling")
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    for folder in (ROOT, *PLUGINS):
        session.run("python", "-m", "build", "--no-isolation", "--outdir", str(dist), str(folder), silent=True)
    core = one_wheel(session, dist, "lwm_core")
    check_core_wheel(session, core)

    scratch = Path(session.create_tmp())
    venv, runs = scratch / "clean", scratch / "runs"
    for folder in (venv, runs):
        shutil.rmtree(folder, ignore_errors=True)
    runs.mkdir()
    session.run("python", "-m", "venv", str(venv))
    python, lwm = (str((venv / VENV_BIN / name).absolute()) for name in ("python", "lwm"))

    def install(*wheel_files: Path) -> None:
        session.run(python, "-m", "pip", "install", "--quiet", "-c", str(CONSTRAINTS), *map(str, wheel_files),
                    external=True)  # fmt: skip

    # By file, not by name: an index can then offer nothing in their place.
    install(core, one_wheel(session, dist, "lwm_jax_ring"))
    with session.chdir(runs):  # outside the checkout, so that only what is installed can be imported
        session.log("lwm run first-run, killed after its first checkpoint")
        kill_after_checkpoint([lwm, "run", "first-run", "--out", "first"], Path("first"))
        session.run(lwm, "resume", "first", external=True)
        told = str(session.run(lwm, "run", "quickstart", success_codes=[2], external=True, silent=True)).strip()
        session.log(told)
        if "\n" in told or "pip install" not in told or Path("runs").exists():
            session.error("lwm run quickstart: expected one line that names what to install, and no folder")
    if "quickstart" in session.posargs:
        install(*sorted(dist.glob("*.whl")))
        with session.chdir(runs):
            session.run(lwm, "run", "quickstart", "--out", "quickstart", external=True)


def kill_after_checkpoint(command: list[str], run: Path) -> None:
    """Start ``command`` and kill it outright once ``run`` holds a whole checkpoint."""
    process = subprocess.Popen(command)
    try:
        while not list(run.glob("checkpoints/step_*/manifest.json")) and process.poll() is None:
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()


@nox.session
def bench(session: nox.Session) -> None:
    """A benchmark by name, its options after it (``-- attention-cpu --help``); without a name, which there are."""
    name, *options = session.posargs or ("",)
    if not name:
        for known, what in BENCHMARKS.items():
            session.log(f"nox -s bench -- {known}: {what}")
        return
    if name not in BENCHMARKS:
        session.error(f"bench: there is no benchmark {name!r}; expected {' or '.join(BENCHMARKS)}")
    on_gpu = name in ON_GPU and not {"--smoke", "--help"} & set(options)
    if name in ON_BOTH:
        backends = [ROOT / "plugins" / plugin for plugin in ("lwm-jax-ring", "lwm-torch-ring")]
        session.install("-c", str(CONSTRAINTS), *editable(ROOT, *backends), "transformers")
    elif name in ON_TORCH:
        beside = TORCH_PEER if name == "attention-cpu-torch" else ()
        session.install("-c", str(CONSTRAINTS), *editable(ROOT, ROOT / "plugins" / "lwm-torch-ring"), *beside)
    else:
        more = [ROOT / "plugins" / "lwm-plan"] if name in WITH_PLAN else []
        session.install("-c", str(CONSTRAINTS), *editable(ROOT, ROOT / "plugins" / "lwm-jax-ring", *more))
        if on_gpu:
            session.install("-c", str(CONSTRAINTS), f"{ROOT / 'plugins' / 'lwm-jax-ring'}[cuda]")
    script = ROOT / "tests" / "bench" / f"{name.replace('-', '_')}.py"
    if name in BESIDE_PEER:
        options = ["--peer-python", peer_environment(session), *options]
    session.run("python", str(script), *options)


def peer_environment(session: nox.Session) -> str:
    """The interpreter of an environment that holds ``PEER`` alone; it cannot share one with this repository's JAX."""
    too_new = (3, 13)  # jaxlib 0.4.31 and NumPy 2.0 have wheels for the Pythons before this one
    found = "python" if sys.version_info < too_new else shutil.which("python3.12") or shutil.which("python3.11")
    if found is None:
        session.error("bench: ringattention's jaxlib 0.4.31 needs Python 3.11 or 3.12 on PATH; install one of them")
    venv = Path(session.create_tmp()).absolute() / "peer"
    python = str(venv / VENV_BIN / "python")
    if not Path(python).exists():
        session.run(found, "-m", "venv", str(venv), external=True)
    session.run(python, "-m", "pip", "install", "--quiet", *PEER, external=True)
    return python


def one_wheel(session: nox.Session, dist: Path, name: str) -> Path:
    """The only wheel of a distribution in ``dist``."""
    found = sorted(dist.glob(f"{name}-*.whl"))
    if len(found) != 1:
        session.error(f"dist/: {len(found)} wheels of {name}; expected one")
    return found[0].absolute()


def check_core_wheel(session: nox.Session, wheel: Path) -> None:
    """The core's wheel is small and holds lwm_core alone."""
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist()}
    foreign = sorted(top for top in tops if top != "lwm_core" and not top.endswith(".dist-info"))
    if foreign or "lwm_core" not in tops:
        session.error(f"{wheel.name}: holds {', '.join(foreign) or 'no lwm_core'}; expected lwm_core alone")
    size = wheel.stat().st_size
    if size >= MAX_CORE_WHEEL:
        session.error(f"{wheel.name}: {size} bytes; expected fewer than {MAX_CORE_WHEEL}")
    session.log(f"{wheel.name}: {size} bytes, lwm_core alone")
