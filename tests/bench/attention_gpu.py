"""``nox -s bench -- attention-gpu``: a ring of 8 played through on one GPU, against one whole call.

Every block that the 8 ranks would compute is computed on the one device, hop by hop, with nothing sent: what dealing a
sequence out costs before any transfer. Beside it stand the same kernel over the whole sequence, and JAX's own attention
by cuDNN; the aim is 0.9 of whichever of these whole calls is the quickest. Kernels ``xla`` and ``cudnn``, causal,
zigzag, bfloat16. Ratios compare what was timed in the same round.

Shapes: B batch, S sequence, H query heads, K key-value heads, D head dim; n ranks of C tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import distributions, version
from pathlib import Path
from shutil import which
from typing import Any

import jax
import jax.numpy as jnp
from bench_result import add_output, hardware, load, output_target
from jax import lax
from jax.sharding import Mesh
from rich import box
from rich.console import Console
from rich.table import Table

from lwm_core.attention import AttentionMask
from lwm_core.errors import LwmError, UnsupportedError
from lwm_core.layout import SequenceLayout
from lwm_jax_ring.attention.options import AttentionOptions
from lwm_jax_ring.attention.spec import AttentionSpec
from lwm_jax_ring.attention.strategies import attention_spec

RESULT = Path(__file__).parents[2] / "docs" / "benchmarks" / "attention-gpu.json"
CAUSAL = AttentionMask("causal")
KERNELS = ("cudnn", "xla")


@dataclass(frozen=True)
class Case:
    """What is timed, and how often; B is 1."""

    seq_len: int = 131_072
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    ranks: int = 8
    chunk: int = 1024
    rounds: int = 5
    dtype: str = "bfloat16"
    interpret: bool = False


SMOKE = Case(
    seq_len=512, heads=4, kv_heads=2, head_dim=16, ranks=4, chunk=32, rounds=1, dtype="float32", interpret=True
)  # fmt: skip

Step = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], Any]
"""(q, k, v, dout), ``[1,S,·,D]`` in the layout's order → what is computed of them."""


def spec_of(case: Case, kernel: str, ranks: int) -> AttentionSpec:
    """Attention of one of ``ranks`` ranks, on this device."""
    options = AttentionOptions(
        kernel=kernel, query_chunk=case.chunk, key_chunk=case.chunk, interpret=case.interpret,
        fused_block=min(8192, case.seq_len // (2 * ranks)),
    )  # fmt: skip
    one = Mesh(jax.devices()[:1], ("sp",))
    alone = attention_spec(options, one, "sp", case.seq_len // ranks, CAUSAL, case.head_dim)
    layout = SequenceLayout("zigzag", ranks) if ranks > 1 else SequenceLayout("contiguous")
    return AttentionSpec("sp", layout, case.seq_len, CAUSAL, alone.kernel)


def played(spec: AttentionSpec, kv_heads: int, backward: bool) -> Step:
    """All blocks of all ranks, one after the other, forward and, if wanted, backward."""
    ranks, kernel = spec.world, spec.kernel

    def dealt(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], ranks, -1, *x.shape[2:]), 1, 0)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> Any:
        k_all, v_all, length = dealt(k), dealt(v), q.shape[1] // ranks

        def rank_of(_: None, x: tuple[jax.Array, ...]) -> tuple[None, Any]:
            rank, q_r, dout_r = x
            mask = spec.queries(rank, None)
            prepared = kernel.queries(q_r, mask, kv_heads)

            def hop(n: jax.Array, state: Any) -> Any:
                source = (rank - n) % ranks
                return kernel.absorb(state, prepared, k_all[source], v_all[source], spec.keys(source, None))

            out, lse = kernel.finish(lax.fori_loop(0, ranks, hop, kernel.start(prepared)), length)
            if not backward:
                return None, (out, lse)
            saved = kernel.saved(q_r, out.astype(q_r.dtype), dout_r, lse, mask, kv_heads)

            def back(n: jax.Array, sums: tuple[Any, jax.Array, jax.Array]) -> tuple[Any, jax.Array, jax.Array]:
                dq, dk, dv = sums
                source = (rank - n) % ranks
                keys = spec.keys(source, None)
                dq, dk_more, dv_more = kernel.gradients(dq, saved, k_all[source], v_all[source], keys)
                return dq, dk.at[source].add(dk_more), dv.at[source].add(dv_more)

            zeros = jnp.zeros(k_all.shape, jnp.float32)
            dq, dk, dv = lax.fori_loop(0, ranks, back, (kernel.start_gradient(saved), zeros, zeros))
            return None, (kernel.finish_gradient(dq, length), dk, dv)

        found = lax.scan(rank_of, None, (jnp.arange(ranks), dealt(q), dealt(dout)))[1]
        return found if not backward else (found[0], found[1].sum(0), found[2].sum(0))

    return run


def library(backward: bool, case: Case) -> Step:
    """JAX's own attention over the whole sequence."""
    implementation = "xla" if case.interpret else "cudnn"

    def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)

    if not backward:
        return lambda q, k, v, dout: forward(q, k, v)
    return lambda q, k, v, dout: jax.vjp(forward, q, k, v)[1](dout)


def sides(case: Case, backward: bool) -> dict[str, Step]:
    """What is timed in a round, by name."""
    steps = {"library": library(backward, case)}
    for kernel in KERNELS:
        for ranks in (1, case.ranks):
            steps[f"{kernel} {ranks}"] = played(spec_of(case, kernel, ranks), case.kv_heads, backward)
    return steps


def measure(case: Case) -> Iterator[dict[str, Any]]:
    """A row for each side and pass: seconds of each round."""
    shape = (1, case.seq_len, case.heads, case.head_dim)
    keys = jax.random.split(jax.random.key(0), 4)
    q, dout = (jax.random.normal(key, shape, case.dtype) for key in keys[:2])
    k, v = (jax.random.normal(key, (*shape[:2], case.kv_heads, case.head_dim), case.dtype) for key in keys[2:])
    for kind, backward in (("forward", False), ("forward+backward", True)):
        steps = {name: jax.jit(step) for name, step in sides(case, backward).items()}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for round_ in range(case.rounds + 1):  # the first compiles
            for name, step in steps.items():
                began = time.perf_counter()
                jax.block_until_ready(step(q, k, v, dout))
                if round_:
                    seconds[name].append(time.perf_counter() - began)
        for name, times in seconds.items():
            yield {"pass": kind, "side": name, "seconds": times}


def flops(case: Case, kind: str) -> float:
    """Floating-point operations of causal attention: half of 4·S²·H·D, and 2.5 times as many back."""
    return 2.0 * case.seq_len**2 * case.heads * case.head_dim * (1.0 if kind == "forward" else 3.5)


def aims(case: Case, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each pass and kernel, the speed of the ring as a share of the quickest whole call: the library's or ours.

    The quickest by its median; the ratio is the median of those within one round.
    """
    found = []
    times = {(row["pass"], row["side"]): row["seconds"] for row in rows}
    for kind in dict.fromkeys(row["pass"] for row in rows):
        whole = {side: times[kind, side] for side in ("library", *(f"{kernel} 1" for kernel in KERNELS))}
        best = min(whole, key=lambda side: statistics.median(whole[side]))
        for kernel in KERNELS:
            ring = times[kind, f"{kernel} {case.ranks}"]
            ratio = statistics.median(a / b for a, b in zip(whole[best], ring, strict=True))
            found.append({"pass": kind, "kernel": kernel, "best": best, "ratio": ratio})
    return found


def software() -> dict[str, str]:
    """jax, jaxlib, and where they are told the driver, CUDA and cuDNN: what a figure of a GPU depends on."""
    found = {name: version(name) for name in ("jax", "jaxlib")}
    for distribution in distributions():
        name = (distribution.metadata["Name"] or "").lower()
        if name.startswith(("nvidia-cuda-runtime", "nvidia-cudnn", "nvidia-cublas", "jax-cuda")):
            found[name] = distribution.version
    if path := which("nvidia-smi"):
        asked = [path, "--query-gpu=driver_version", "--format=csv,noheader"]
        told = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
        found |= {"driver": told[0]} if told else {}
    return found


def show(result: dict[str, Any], console: Console) -> None:
    """The table for people."""
    case = Case(**result["case"])
    table = Table(
        title=f"attention-gpu: S={case.seq_len}, H={case.heads}, K={case.kv_heads}, D={case.head_dim}, {case.dtype}, "
        f"causal, a ring of {case.ranks} on {result['device']}",
        box=box.SIMPLE_HEAD, title_justify="left", title_style="bold",
    )  # fmt: skip
    for column in ("pass", "kernel"):
        table.add_column(column)
    for column in ("whole, TFLOP/s", "ring, TFLOP/s", "ring / whole", "ring / library", "ring / best"):
        table.add_column(column, justify="right")
    times = {(row["pass"], row["side"]): row["seconds"] for row in result["rows"]}
    aim = {(one["pass"], one["kernel"]): one for one in result["aim"]}
    for kind in dict.fromkeys(row["pass"] for row in result["rows"]):
        for kernel in KERNELS:
            whole, ring = times[kind, f"{kernel} 1"], times[kind, f"{kernel} {case.ranks}"]
            ratio, library_ratio = (
                statistics.median(a / b for a, b in zip(other, ring, strict=True))
                for other in (whole, times[kind, "library"])
            )
            rates = (f"{flops(case, kind) / statistics.median(side) / 1e12:.3g}" for side in (whole, ring))
            best = aim[kind, kernel]
            told = f"{best['ratio']:.2f} of {best['best']}"
            table.add_row(kind, kernel, *rates, f"{ratio:.2f}", f"{library_ratio:.2f}", told)
    console.print(table)
    if result["smoke"]:
        console.print("[yellow]--smoke: this shows that the benchmark runs; its figures mean nothing.[/yellow]")


def main(arguments: list[str]) -> int:
    """Measure, show, and write where it was asked for; the exit code."""
    parser = argparse.ArgumentParser(prog="nox -s bench -- attention-gpu", description=__doc__.split("\n")[0])
    add_output(parser, RESULT)
    given, console = parser.parse_args(arguments), Console()
    try:
        target = output_target(given, RESULT)
        device, case = jax.devices()[0], SMOKE if given.smoke else Case()
        if device.platform not in ("gpu", "cuda") and not given.smoke:
            raise UnsupportedError(f"attention-gpu: needs an NVIDIA GPU, jax sees {device.platform}; or give --smoke")
        machine = {**hardware(), "load_before": load()}
        rows = list(measure(case))
    except LwmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    result = {
        "benchmark": "attention-gpu", "smoke": given.smoke, "date": date.today().isoformat(), "hardware": machine,
        "device": device.device_kind, "versions": software(),
        "command": " ".join(("nox -s bench -- attention-gpu", *arguments)),
        "case": asdict(case), "aim": aims(case, rows), "rows": rows,
    }  # fmt: skip
    show(result, console)
    if target is not None:
        target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        console.print(f"Written to {target}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
