"""Draw docs/assets/plan-step.svg and plan-longest.svg from what ``lwm plan`` finds for LWM-7B.

``python docs/figures/plan.py [FOLDER]``, which also prints the page's table; needs lwm-plan, and lwm-jax-ring for the
recipe's options. The first has what a step of each stage of ``lwm-text`` is made of, on the paper's mesh and on the
best; the second the longest context that fits so many devices. They are written without a drawing library, so that the
same numbers give the same bytes, and their colours follow the reader's light or dark mode.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from html import escape
from math import log2
from pathlib import Path

from lwm_core.errors import ShapeError
from lwm_core.protocols import Stage
from lwm_plan.hardware import DEVICES, Machine, read_machine
from lwm_plan.job import Job, place
from lwm_plan.memory import least
from lwm_plan.sources import Source, read_source
from lwm_plan.stage_plan import Evaluated, evaluate, meshes, search

OUT = Path(__file__).parents[1] / "assets"
RECIPE = "lwm-text"
MACHINES = (("v4-512",), ("v5p-512",), ("v6e-256",), ("h100x64", "h200x64"))
"""A panel each; machines of one panel take the same time to a thousandth, as a test holds."""
LONGEST = (("v5p", "v5p"), ("h100", "H100"))
REMATS = ("attention", "offload")
DEVICE_COUNTS = tuple(2**k for k in range(3, 10))
LENGTHS = tuple(2**k * quarter // 4 for k in range(14, 28) for quarter in (4, 5, 6, 7))
"""Lengths that are tried: four to a doubling, 16K to 224M."""
COMPILED = Path(__file__).parents[1] / "benchmarks" / "aot.json"

WIDTH = 480
FONT = "ui-sans-serif,system-ui,-apple-system,Segoe UI,Roboto,Helvetica,Arial,sans-serif"
STYLE = f"""
text{{font:14px {FONT};fill:#1d2228}} .b{{font-weight:600;font-size:15px}} .m{{fill:#59626d}} .e{{text-anchor:end}}
.c{{text-anchor:middle}} .g{{stroke:#dfe3e8}} .hidden{{opacity:.45}}
.matrices{{fill:#8fb8c9}} .attention{{fill:#17738c}} .tp{{fill:#c2413a}} .sp{{fill:#d9922e}} .parameters{{fill:#8059b0}}
.l{{fill:none;stroke-width:2.5}} .v5p{{stroke:#17738c}} .h100{{stroke:#c2413a}} .r-offload{{stroke-dasharray:5 4}}
.limit{{stroke:#59626d;stroke-width:1.5}}
.t-v5p{{fill:#17738c}} .t-h100{{fill:#b23630}}
@media (prefers-color-scheme:dark){{.hidden{{opacity:.65}}
text{{fill:#e8ebee}} .m{{fill:#a7b0ba}} .g{{stroke:#3a424c}}
.matrices{{fill:#5f8797}} .attention{{fill:#3fa3c0}} .tp{{fill:#e5665c}} .sp{{fill:#e5a84e}} .parameters{{fill:#a585d0}}
.v5p{{stroke:#3fa3c0}} .h100{{stroke:#e5665c}} .limit{{stroke:#a7b0ba}} .t-v5p{{fill:#5fb8d2}} .t-h100{{fill:#ee8077}}}}
"""


@lru_cache(maxsize=1)
def source() -> Source:
    """The recipe."""
    return read_source(RECIPE, [], None, None, None)


@dataclass(frozen=True)
class Step:
    """One stage on one machine: by the paper's mesh, and by the best that is found."""

    stage: Stage
    paper: Evaluated
    best: Evaluated


@lru_cache(maxsize=16)
def steps(machine: str) -> tuple[Step, ...]:
    """All stages of the recipe on ``machine``; every one fits."""
    found = []
    for stage in source().stages:
        where = read_machine(machine)
        paper, best = evaluate(source().job, stage, where), search(source().job, stage, where)
        if best is None or not (paper.fits and best.fits):
            raise SystemExit(f"docs/figures/plan.py: {stage.name} does not fit {machine}, and must for the figure")
        found.append(Step(stage, paper, best))
    return tuple(found)


def kind(what: str) -> str:
    """The name in the figure of a transfer: the axis by which it is chosen."""
    return {"stream": "tp", "attention": "sp", "parameters": "parameters", "copies": "parameters"}[what]


def parts(found: Evaluated) -> dict[str, float]:
    """Seconds of a step: arithmetic, then what is exposed; their sum is the step."""
    time = found.timing
    return {
        "matrices": time.matrices + time.update, "attention": time.attention,
        **{name: sum(t.exposed for t in time.transfers if kind(t.what) == name) for name in ("tp", "sp", "parameters")},
    }  # fmt: skip


def hidden(found: Evaluated) -> dict[str, float]:
    """Seconds of transfers that arithmetic hides."""
    return {
        name: sum(t.seconds - t.exposed for t in found.timing.transfers if kind(t.what) == name)
        for name in ("tp", "sp", "parameters")
    }


@lru_cache(maxsize=64)
def longest(device: str, devices: int, remat: str) -> int:
    """The greatest of :data:`LENGTHS` of which one row fits so many devices; 0 for none."""
    job, machine = replace(source().job, remat=remat), Machine("", DEVICES[device], 1).with_devices(devices)
    fitting = (length for length in reversed(LENGTHS) if any_fits(job, one_row(length), machine))
    return next(fitting, 0)


def any_fits(job: Job, stage: Stage, machine: Machine) -> bool:
    """Whether a mesh of all devices has room, with the recipe's ring; it need not be a fast one."""
    for mesh in meshes(job, stage, machine.devices):
        try:
            possible = least(place(job, stage, machine.devices, mesh)) <= machine.device.memory
            if possible and evaluate(job, stage, machine, mesh).fits:
                return True
        except ShapeError:
            continue  # heads or length do not divide over this one
    return False


def longest_compiled() -> int:
    """Tokens of the longest row that the TPU compiler has taken (docs/benchmarks/aot.md)."""
    rows = json.loads(COMPILED.read_text(encoding="utf-8"))["rows"]
    return max(int(row["seq_len"]) for row in rows if row["problem"] is None)


def one_row(seq_len: int) -> Stage:
    """The last stage with one row of ``seq_len`` tokens a step."""
    return replace(source().stages[-1], name="row", seq_len=seq_len, tokens=seq_len, batch_tokens=seq_len, accumulate=1)


def curve(device: str, remat: str) -> list[tuple[int, int]]:
    """(devices, longest context) where anything fits."""
    return [(n, length) for n in DEVICE_COUNTS if (length := longest(device, n, remat))]


def tokens(count: int) -> str:
    """32768 as 32K."""
    return f"{count / 2**20:g}M" if count >= 2**20 else f"{count / 2**10:g}K"


def seconds(value: float) -> str:
    """A time with its unit."""
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"


def table() -> list[str]:
    """The rows of the page's table (docs/explanation/planning.md)."""
    return [
        f"| {', '.join(names)} | {step.stage.name} | " + " | ".join(
            f"`{found.mesh}` | {found.timing.seconds:.2f} | {sum(t.exposed for t in found.timing.transfers):.2f}"
            for found in (step.paper, step.best)
        ) + " |"
        for names in MACHINES for step in steps(names[0])
    ]  # fmt: skip


# -- drawing ---------------------------------------------------------------------------------------------------------

BAR_X, BAR_W, BAR_H, STRIP_H, PITCH = 50, 232, 10, 3, 17
ROW_H = 2 * PITCH + 8


def rect(x: float, y: float, w: float, h: float, name: str) -> str:
    """A filled rectangle."""
    return f'<rect x="{x:.2f}" y="{y:.2f}" width="{w:.2f}" height="{h:.2f}" class="{name}"/>'


def text(x: float, y: float, said: str, name: str = "") -> str:
    """Words."""
    return f'<text x="{x:.2f}" y="{y:.2f}" class="{name}">{escape(said)}</text>'


def bar(found: Evaluated, whole: float, y: float, told: str) -> Iterator[str]:
    """A step as a bar, ``whole`` seconds wide in all; what hides as a strip under it."""
    told_of = {**parts(found), **{f"{name} hidden": value for name, value in hidden(found).items()}}
    words = ", ".join(f"{name} {seconds(value)}" for name, value in told_of.items() if value >= 0.005)
    yield f"<g><title>{escape(told)}, mesh {found.mesh}: {seconds(found.timing.seconds)}: {words}</title>"
    for values, top, height, more in ((parts(found), y, BAR_H, ""), (hidden(found), y + BAR_H, STRIP_H, " hidden")):
        x = float(BAR_X)
        for name, value in values.items():
            width = value / whole * BAR_W
            if width >= 0.005:
                yield rect(x, top, width, height, name + more)
            x += width
    yield "</g>"


def panel(names: Sequence[str], y: float) -> Iterator[str]:
    """One machine's stages."""
    machine = read_machine(names[0])
    yield text(0, y + 13, ", ".join(names), "b")
    yield text(BAR_X + BAR_W + 8, y + 13, f"{machine.devices} devices", "m")
    for index, step in enumerate(steps(names[0])):
        top = y + 24 + index * ROW_H
        yield text(BAR_X - 8, top + 19, step.stage.name, "e")
        for line, (found, told) in enumerate(((step.paper, "paper's mesh"), (step.best, "best mesh"))):
            at = top + line * PITCH
            yield from bar(found, step.paper.timing.seconds, at, f"{names[0]}, {step.stage.name}, {told}")
            yield text(BAR_X + BAR_W + 58, at + 10, seconds(found.timing.seconds), "e" if not line else "e m")
            yield text(BAR_X + BAR_W + 66, at + 10, f"{'paper' if not line else 'best'} {found.mesh}", "m")


LEGEND = (
    ("matrices", "matrix products"), ("attention", "attention"), ("tp", "tp: stream"), ("sp", "sp: keys, values"),
    ("parameters", "fsdp, sp: parameters"),
)  # fmt: skip


def legend(y: float) -> Iterator[str]:
    """What the colours are."""
    places = ((0, 0), (150, 0), (0, 1), (150, 1), (310, 1))
    for (name, said), (x, line) in zip(LEGEND, places, strict=True):
        yield rect(x, y + 1 + 20 * line, 12, 12, name)
        yield text(x + 18, y + 12 + 20 * line, said)
    told = ("thick: the step, with what is exposed of transfers", "thin, pale: what arithmetic hides of transfers",
            "full width: the step on the paper's mesh, each length anew")  # fmt: skip
    for line, said in enumerate(told):
        yield text(0, y + 54 + 18 * line, said, "m")


def svg(height: float, what: str, body: Sequence[str]) -> str:
    """A whole file."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:g}" '
        f'viewBox="0 0 {WIDTH} {height:g}" role="img">'
    )
    return "\n".join((head, f"<title>{escape(what)}</title>", f"<style>{STYLE}</style>", *body, "</svg>", ""))


def draw_steps() -> str:
    """The first figure."""
    tall = 24 + len(source().stages) * ROW_H + 12
    body = [*legend(0)]
    for index, names in enumerate(MACHINES):
        body += panel(names, 106 + index * tall)
    return svg(106 + len(MACHINES) * tall, "What a training step of LWM-7B is made of, by context and machine", body)


LEFT, TOP, PLOT_W, PLOT_H = 50, 32, 328, 320


def draw_longest() -> str:
    """The second figure: both axes by doublings."""
    curves = {(device, remat): curve(device, remat) for device, _ in LONGEST for remat in REMATS}
    lengths = [length for points in curves.values() for _, length in points]
    low, high = int(log2(min(lengths))), int(-(-log2(max(lengths)) // 1))
    first, last = log2(DEVICE_COUNTS[0]), log2(DEVICE_COUNTS[-1])

    def at(devices: int, length: float) -> tuple[float, float]:
        across = (log2(devices) - first) / (last - first)
        return LEFT + across * PLOT_W, TOP + PLOT_H * (high - log2(length)) / (high - low)

    body = [text(0, 13, "longest context, tokens", "m")]
    for power in range(low, high + 1):
        _, y = at(DEVICE_COUNTS[0], 2**power)
        body.append(f'<line x1="{LEFT}" x2="{LEFT + PLOT_W}" y1="{y:.2f}" y2="{y:.2f}" class="g"/>')
        body.append(text(LEFT - 8, y + 4, tokens(2**power), "e m"))
    for devices in DEVICE_COUNTS:
        body.append(text(at(devices, 2**low)[0], TOP + PLOT_H + 18, str(devices), "c m"))
    body.append(text(LEFT + PLOT_W / 2, TOP + PLOT_H + 40, "devices", "c m"))
    limit = longest_compiled()
    _, y = at(DEVICE_COUNTS[0], limit)
    body.append(f'<line x1="{LEFT}" x2="{LEFT + PLOT_W}" y1="{y:.2f}" y2="{y:.2f}" class="g limit"/>')
    body.append(text(LEFT + 6, y - 5, f"compiled: {tokens(limit)}", "m"))
    for (device, remat), points in curves.items():
        line = " ".join(f"{x:.2f},{y:.2f}" for x, y in (at(*point) for point in points))
        told = ", ".join(f"{n} devices {tokens(length)}" for n, length in points)
        body.append(f"<g><title>{device}, remat {remat}: {told}</title>")
        body.append(f'<polyline points="{line}" class="l {device} r-{remat}"/></g>')
        said = dict(LONGEST)[device] + (", offload" if remat == "offload" else "")
        x, y = at(*points[-1])
        body.append(text(x + 6, y + 4, said, f"t-{device}"))
    return svg(TOP + PLOT_H + 50, "The longest context of LWM-7B that fits so many devices", body)


FIGURES = {"plan-step.svg": draw_steps, "plan-longest.svg": draw_longest}


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else OUT
    folder.mkdir(parents=True, exist_ok=True)
    print("\n".join(table()))
    for name, draw in FIGURES.items():
        (folder / name).write_text(draw(), encoding="utf-8")
