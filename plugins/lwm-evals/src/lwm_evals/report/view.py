"""From a run's data to the page: numbers are worked out here, the template only lays them out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from lwm_evals import figures
from lwm_evals.report import text
from lwm_evals.report.collect import RunData, StageMetrics, number, rows_of
from lwm_evals.report.needles import before_and_after, needle
from lwm_evals.report.vision import continuation, reconstruction, video_loss

Row = dict[str, Any]

DASH = "–"
WIDE, NARROW, HALF = (9.6, 3.2), (4.2, 3.3), (4.6, 2.3)


def page(data: RunData) -> str:
    """The page as HTML, complete in itself: no script, no link to load, the light and the dark look."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        count=text.count, si=text.short, duration=text.duration, percent=text.percent, plain=text.plain
    )
    folder = files("lwm_evals.report")
    template = environment.from_string(folder.joinpath("page.html.j2").read_text(encoding="utf-8"))
    style = Markup(folder.joinpath("style.css").read_text(encoding="utf-8"))
    return template.render(
        style=style,
        name=str(data.run.get("name") or data.folder.resolve().name),
        summary=str(data.run.get("summary") or data.table("config").get("summary") or ""),
        notes=data.notes,
        head=headline(data),
        progress=progress(data),
        curves=curves(data),
        needles=[needle(data, name, results) for name, results in data.needles.items() if results["summary"]],
        losses=[video_loss(data, name) for name, rows in data.losses.items() if rows],
        reconstructions=[reconstruction(data, name) for name in data.reconstructions],
        continuations=[continuation(data, name) for name, (rows, _) in data.continuations.items() if rows],
        suites=suites(data),
        stages=stage_table(data),
        samples=[sample(row) for row in data.samples],
        schedule=schedule(data),
        config=config(data),
        plugins=plugins(data),
        choices=choices(data),
        versions=text.flatten(data.table("versions")),
        machine=text.flatten(data.table("machine")),
        trainer=text.flatten(data.table("trainer")),
        model=text.flatten(data.table("model")),
    )


def headline(data: RunData) -> Row:
    """What was extended from and to, and the figures that tell whether it worked; None for what is not known."""
    lengths = [row["seq_len"] for row in data.schedule if isinstance(row.get("seq_len"), int)]
    start = data.table("start").get("seq_len")
    begun = start if isinstance(start, int) else (lengths[0] if len(set(lengths)) > 1 else None)
    longest = max(lengths, default=None)
    steps = [row for stage in data.stages for row in stage.rows]
    seconds = float(np.nansum([number(row.get("step_seconds")) for row in steps])) if steps else None
    return {
        "start": begun if begun != longest else None,
        "end": longest,
        "factor": longest / begun if longest and begun and longest > begun else None,
        "accuracy": before_and_after(data),
        "tokens": steps[-1].get("tokens") if steps else None,
        "steps": len(steps),
        "seconds": seconds,
        "parameters": data.table("model").get("parameter_count"),
    }


def progress(data: RunData) -> Row | None:
    """Share of the scheduled steps that are done and how the run stands; None for a run that has done them all."""
    planned = sum(steps_of(row) or 0 for row in data.schedule)
    done = sum(len(stage.rows) for stage in data.stages)
    return {"share": done / planned, "status": str(data.run.get("status") or "")} if done < planned else None


def steps_of(stage: Mapping[str, Any]) -> int | None:
    """Steps of a stage in ``run.json``: tokens rounded up to whole steps."""
    tokens, batch = number(stage.get("tokens")), number(stage.get("batch_tokens"))
    return math.ceil(tokens / batch) if tokens > 0 and batch > 0 else None


def curves(data: RunData) -> Row:
    """Loss over tokens in two sizes, and the small figures; None where the metric is nowhere."""
    few = len(data.stages) <= 4  # on a phone the names of more stages would run into each other
    return {
        "loss": _curve(data, "loss", "loss, nats a token", WIDE, smooth=True, named=True),
        "loss_narrow": _curve(data, "loss", "loss, nats a token", NARROW, smooth=True, named=few),
        "tokens_per_second": _curve(data, "tokens_per_second", "tokens a second", HALF, from_zero=True),
        "lr": _curve(data, "lr", "learning rate", HALF),
    }


def _curve(data: RunData, metric: str, label: str, size: tuple[float, float], **how: bool) -> Markup | None:
    series = []
    for stage in data.stages:
        tokens, values = stage.values("tokens"), stage.values(metric)
        kept = [(x, y) for x, y in zip(tokens, values, strict=True) if math.isfinite(x) and math.isfinite(y)]
        if kept:
            series.append((stage.name, [x for x, _ in kept], [y for _, y in kept]))
    if not series or series[-1][1][-1] <= 0:
        return None
    figure = figures.curve(series, label, size=size, **how)
    return Markup(figures.inline(figure, f"{metric}-{size[0]:g}".replace(".", "-")))


def suites(data: RunData) -> list[Row]:
    """Every other suite's summary as a plain table."""
    tables = []
    for name, rows in data.suites.items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        tables.append({"name": name, "columns": columns, "rows": [[row.get(c, DASH) for c in columns] for row in rows]})
    return tables


def stage_table(data: RunData) -> list[Row]:
    """Throughput and loss of each stage; medians, for the first steps compile."""
    return [
        {
            "name": stage.name,
            "steps": len(stage.rows),
            "tokens": _stage_tokens(data, k),
            "seconds": float(np.nansum(stage.values("step_seconds"))),
            "step_seconds": _median(stage.values("step_seconds")),
            "tokens_per_second": _median(stage.values("tokens_per_second")),
            "mfu": _median(stage.values("mfu")),
            "first": _mean(stage.values("loss")[: _few(stage)]),
            "last": _mean(stage.values("loss")[-_few(stage) :]),
        }
        for k, stage in enumerate(data.stages)
    ]


def _stage_tokens(data: RunData, k: int) -> float | None:
    before = number(data.stages[k - 1].rows[-1].get("tokens")) if k else 0.0
    found = number(data.stages[k].rows[-1].get("tokens")) - before
    return found if math.isfinite(found) else None


def _few(stage: StageMetrics) -> int:
    return max(1, len(stage.rows) // 20)


def _median(values: list[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return float(np.median(finite)) if finite else None


def _mean(values: list[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return float(np.mean(finite)) if finite else None


def sample(row: Mapping[str, Any]) -> Row:
    """One generated text: a long prompt keeps its start and end, the whole of it folded away."""
    prompt = str(row.get("prompt", ""))
    return {
        "stage": str(row.get("stage", "")),
        "prompt": text.shorten(prompt),
        "whole": prompt if text.shorten(prompt) != prompt else None,
        "text": str(row.get("text", "")),
        "tokens_per_second": row.get("tokens_per_second"),
    }


def schedule(data: RunData) -> Row | None:
    """The stages' settings; a column that no stage has is left out."""
    if not data.schedule:
        return None
    names = {
        "name": "stage", "seq_len": "length", "theta": "RoPE base", "tokens": "tokens", "batch_tokens": "batch tokens",
        "accumulate": "accumulate", "steps": "steps", "lr": "learning rate", "min_lr": "lowest rate",
        "lr_schedule": "shape", "warmup_steps": "warm-up steps", "mesh": "mesh dp,fsdp,tp,sp", "mix": "data mix",
    }  # fmt: skip
    rows = []
    for row in data.schedule:
        rope = row.get("rope")
        theta = rope.get("theta") if isinstance(rope, Mapping) else row.get("theta")
        rows.append({**row, "theta": theta, "steps": steps_of(row)})
    columns = [key for key in names if any(row.get(key) is not None for row in rows)]
    first = rows[0]
    alike = [key for key in columns[1:] if len(rows) > 2 and all(row.get(key) == first.get(key) for row in rows)]
    same = {key: first.get(key) for key in alike}
    shown = [key for key in columns if key not in same]
    return {
        "columns": [names[key] for key in shown],
        "rows": [[text.plain(row.get(key)) for key in shown] for row in rows],
        "same": [(names[key], text.plain(value)) for key, value in same.items()],
    }


def config(data: RunData) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """The configuration by section: (key, value, where it came from)."""
    origins = data.table("origins")
    sections: dict[str, list[tuple[str, str, str]]] = {}
    for key, value in text.flatten(data.table("config")):
        section, _, rest = key.partition(".")
        listed = key.replace("[", ".").replace("]", "")
        origin = origins.get(listed) or ("default" if origins else "")
        if not rest:
            section, rest = (section if "[" in section else "general"), key
        sections.setdefault(section, []).append((rest, value, str(origin)))
    return list(sections.items())


def plugins(data: RunData) -> list[Row]:
    """The plugins in use; what is unknown of one is a dash."""
    rows = data.run.get("plugins")
    return [
        {key: str(row.get(key) or DASH) for key in ("kind", "name", "dist", "version")}
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, Mapping)
    ]


def choices(data: RunData) -> list[str]:
    """What was chosen for each kind, and why not the others: a line a choice."""
    lines = []
    for row in rows_of(data.run.get("choices")):
        asked = f" (asked for: {row['asked']})" if row.get("asked") not in (None, row.get("chosen")) else ""
        rejected = [f"{one.get('name')}: {one.get('reason')}" for one in rows_of(row.get("rejected"))]
        against = f"; rejected {'; '.join(rejected)}" if rejected else ""
        lines.append(f"{row.get('kind')} = {row.get('chosen')}{asked}{against}")
    return lines
