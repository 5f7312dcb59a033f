"""``nox -s bench -- planning``: seconds a step by ``lwm plan`` beside those of the trainer ``jax``, on this machine.

What the machine reaches is measured first, apart from the trainer: large matrix products (the peak), products of the
model's own shapes, one layer's attention forward and backward, and memory. From that a hardware file is written, as
a user would, and ``lwm plan --hardware FILE`` predicts the step of the preset ``tiny`` at four lengths. Then the same
recipe's trainer takes its steps. Nothing is fitted to a length, and no step tells anything to the plan.

Shapes: B batch, S sequence, H query heads, K key-value heads, D head dim, E hidden size, F feed-forward.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_report import run as run_report
from bench_result import add_output, hardware, load
from jax.sharding import Mesh
from rich.console import Console

from lwm_core.attention import AttentionMask
from lwm_core.attention_cost import BACKWARD_PRODUCTS, FORWARD_PRODUCTS, AttentionShape
from lwm_core.batch import PackedBatch
from lwm_core.cli import main as lwm
from lwm_core.config import load_config
from lwm_core.config.dump import dump_toml
from lwm_core.errors import LwmError, UsageError
from lwm_core.mesh import MESH_AXES
from lwm_core.model import ModelConfig
from lwm_core.pipeline import Pipeline, build
from lwm_core.protocols import AttentionAxes, Stage
from lwm_core.registry import Registry

RECIPE = Path(__file__).parent / "planning" / "tiny.toml"
RESULT = Path(__file__).parents[2] / "docs" / "benchmarks" / "planning.json"
CAUSAL = AttentionMask("causal")


@dataclass(frozen=True)
class Case:
    """What is measured: ``stages`` of the recipe by name, ``rounds`` of rates and of steps of ``batch_tokens``.

    ``square``: side of the product that is taken for the peak; ``copied``: float32 elements that are read and written;
    ``attended``: tokens of the row whose attention is timed.
    """

    stages: tuple[str, ...] = ("512", "1024", "2048", "4096")
    rounds: int = 7
    batch_tokens: int = 4096
    square: int = 1536
    copied: int = 2**26
    attended: int = 2048

    @property
    def overrides(self) -> list[str]:
        """Of the recipe, as ``-s`` takes them."""
        return [f"stages.{index}.batch_tokens={self.batch_tokens}" for index in range(len(self.stages))]


SMOKE = Case(("512",), 1, 512, 256, 2**20, 512)


def choose_case(given: argparse.Namespace) -> Case:
    """The case of a command line; raises UsageError where a value is none, before anything runs."""
    if given.rounds is not None and given.rounds < 1:
        raise UsageError(f"planning: --rounds {given.rounds}; expected at least 1")
    case = SMOKE if given.smoke else Case()
    return case if given.rounds is None else Case(**{**asdict(case), "rounds": given.rounds})


def timed(function: Callable[[], Any], times: int = 1) -> float:
    """Seconds of a call, the mean of ``times``."""
    began = time.perf_counter()
    for _ in range(times):
        jax.block_until_ready(function())
    return (time.perf_counter() - began) / times


def arrays(*shapes: tuple[int, ...]) -> Iterator[jax.Array]:
    """Normal float32 arrays."""
    generator = np.random.default_rng(0)
    for shape in shapes:
        yield jnp.asarray(generator.standard_normal(shape, np.float32))


Work = tuple[float, Callable[[], Any]]
"""Operations or bytes of a call, and the call."""


def products(tokens: int, rows: int, columns: int) -> Work:
    """``[tokens, rows] @ [rows, columns]`` and back by a second matrix."""
    x, up, down = arrays((tokens, rows), (rows, columns), (columns, rows))
    run = jax.jit(lambda x, up, down: (x @ up) @ down)
    return 4.0 * tokens * rows * columns, lambda: run(x, up, down)


def copies(elements: int) -> Work:
    """Read so many float32 elements and write as many."""
    (x,) = arrays((elements,))
    run = jax.jit(lambda x: x * 1.5)
    return 8.0 * elements, lambda: run(x)


def attentions(model: ModelConfig, factory: Any, options: Any, tokens: int) -> Work:
    """One layer's attention of one row, forward and backward."""
    shape = AttentionShape(tokens, model.num_heads, model.num_kv_heads, model.head_dim)
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), MESH_AXES)
    backend = factory.build(options, mesh, AttentionAxes(), tokens)
    heads = (model.num_heads, model.num_kv_heads, model.num_kv_heads, model.num_heads)
    q, k, v, dout = arrays(*((1, tokens, count, model.head_dim) for count in heads))
    segments = jnp.ones((1, tokens), jnp.int32)
    step = jax.jit(jax.grad(lambda *x: (backend.attend(*x, CAUSAL, segments) * dout).sum(), argnums=(0, 1, 2)))
    return shape.flops(FORWARD_PRODUCTS + BACKWARD_PRODUCTS), lambda: step(q, k, v)


def rates(case: Case, pipeline: Pipeline, console: Console) -> dict[str, list[float]]:
    """Operations a second of products and attention, bytes a second of memory: each round's, all measured in turn."""
    model, attention = pipeline.model, pipeline.selection.attention
    factory = Registry.from_environment().load("attention", attention.name)
    options = attention.options
    works = {
        "square": products(case.square, case.square, case.square),
        "model": products(pipeline.stages[0].batch_tokens, model.hidden_size, model.intermediate_size),
        "attention": attentions(model, factory, options, case.attended),
        "memory": copies(case.copied),
    }
    found: dict[str, list[float]] = {name: [] for name in works}
    for _, call in works.values():
        timed(call)  # compiles
    for _ in range(case.rounds):
        for name, (amount, call) in works.items():
            found[name].append(amount / timed(call, 3))
    told = ", ".join(f"{name} {statistics.median(each) / 1e9:.1f}" for name, each in found.items())
    console.print(f"[dim]rates, GFLOP/s or GB/s: {told}[/dim]", highlight=False)
    return found


def machine_file(found: dict[str, list[float]]) -> dict[str, Any]:
    """What the hardware file says, of medians; the peak is the greatest rate of any product: no share is above 1."""
    middle = {name: statistics.median(each) for name, each in found.items()}
    peak = max(middle["square"], middle["model"], middle["attention"])
    return {
        "name": "cpu", "peak_flops": peak, "memory": float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        "memory_bandwidth": middle["memory"], "matrix_share": middle["model"] / peak,
        "attention_share": middle["attention"] / peak, "source": "measured by tests/bench/planning.py, float32",
    }  # fmt: skip


def planned(file: dict[str, Any], case: Case) -> dict[str, dict[str, Any]]:
    """What ``lwm plan`` says of each stage, by name.

    Raises:
        LwmError: the command fails.
    """
    words = [word for name in case.stages for word in ("--stage", name)]
    words += [word for override in case.overrides for word in ("-s", override)]
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()) as shown:
        path = Path(folder) / "cpu.toml"
        path.write_text(dump_toml(file), encoding="utf-8")
        code = lwm(["plan", str(RECIPE), "--hardware", str(path), "--json", *words])
    if code:
        raise LwmError(f"planning: lwm plan ended with {code}: {shown.getvalue()[:200]}")
    return {one["name"]: one for one in json.loads(shown.getvalue())["stages"]}


def batch(stage: Stage, vocabulary: int) -> PackedBatch:
    """Rows of one document each, of tokens drawn evenly."""
    ids = np.random.default_rng(1).integers(0, vocabulary, (stage.rows, stage.seq_len + 1))
    ones = np.ones((stage.rows, stage.seq_len))
    return PackedBatch(ids[:, :-1], ids[:, 1:], ones, np.broadcast_to(np.arange(stage.seq_len), ones.shape), ones)


def steps(case: Case, pipeline: Pipeline, console: Console) -> dict[str, list[float]]:
    """Seconds of a training step of each stage, each round's; a stage's rounds follow each other."""
    trainer = pipeline.make_trainer()
    found: dict[str, list[float]] = {}
    for stage in (stage for stage in pipeline.stages if stage.name in case.stages):
        trainer.begin_stage(stage)
        given = batch(stage, pipeline.model.vocabulary.text_size)
        trainer.step(given, 0)  # compiles
        found[stage.name] = []
        for number in range(case.rounds):
            began = time.perf_counter()
            trainer.step(given, number)  # its metrics are on the host when it returns, and so it is done
            found[stage.name].append(time.perf_counter() - began)
        console.print(f"[dim]{stage.name} tokens a row: {min(found[stage.name]):.2f} s a step[/dim]", highlight=False)
    return found


def measure(case: Case, console: Console) -> dict[str, Any]:
    """The result as it is written."""
    machine = {**hardware(), "load_before": load()}
    pipeline = build(load_config(str(RECIPE), case.overrides), Registry.from_environment())
    before = rates(case, pipeline, console)
    taken = steps(case, pipeline, console)
    after = rates(case, pipeline, console)
    found = {name: [*before[name], *after[name]] for name in before}
    file = machine_file(found)
    plan = planned(file, case)
    rows = []
    for name, seconds in taken.items():
        middle = statistics.median(seconds)
        rows.append({"stage": name, "rows": plan[name]["rows"], "planned": plan[name]["step_seconds"],
                     "measured": seconds, "ratio": plan[name]["step_seconds"] / middle})  # fmt: skip
    return {
        "benchmark": "planning", "smoke": case.stages == SMOKE.stages, "date": date.today().isoformat(),
        "hardware": {**machine, "load_after": load()},
        "versions": {name: version(name) for name in ("lwm-plan", "lwm-jax-ring", "jax")},
        "case": asdict(case), "rates": found, "file": file, "rows": rows,
    }  # fmt: skip


def table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows, for people and for the page."""
    rows = [
        [row["stage"], str(row["rows"]), f"{row['planned']:.3f}", f"{statistics.median(row['measured']):.3f}",
         f"{min(row['measured']):.3f} to {max(row['measured']):.3f}", f"{row['ratio']:.2f}"]
        for row in result["rows"]
    ]  # fmt: skip
    return ["tokens a row", "rows", "planned, s a step", "measured", "least to greatest", "planned ÷ measured"], rows


def footnote(result: dict[str, Any]) -> str:
    """What it takes to read the table."""
    machine, versions, file = result["hardware"], result["versions"], result["file"]
    return (
        f"{result['date']}, {machine['cpu']}, {machine['cores']} cores, {machine['system']}, load "
        f"{machine['load_before']} before and {machine['load_after']} after; jax {versions['jax']}. Preset tiny, "
        f"vocabulary 4096, float32. Measured rates: {file['peak_flops'] / 1e9:.0f} GFLOP/s at the peak, of which the "
        f"model's matrix products reach {file['matrix_share']:.0%} and attention {file['attention_share']:.0%}; memory "
        f"{file['memory_bandwidth'] / 1e9:.1f} GB/s."
    )


def main(arguments: list[str]) -> int:
    """Measure, show, and write where it was asked for; the exit code."""
    parser = argparse.ArgumentParser(prog="nox -s bench -- planning", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, metavar="N", help="of every measurement (7)")
    add_output(parser, RESULT)
    given = parser.parse_args(arguments)
    return run_report(
        Path(__file__), arguments, given, RESULT, lambda console: measure(choose_case(given), console), table, footnote
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
