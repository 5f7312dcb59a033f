"""The needle suites' part of the page: heat maps by stage, accuracy by length, some answers that were wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from lwm_evals import figures
from lwm_evals.report.collect import RunData, number, rows_of

Row = dict[str, Any]


def before_and_after(data: RunData) -> Row | None:
    """Needle accuracy of the first and the last evaluated stage at the longest length that both have.

    Of needles in text where there are any, else of those in video.
    """
    tables = sorted((results for results in data.needles.values() if results["summary"]), key=_is_video)
    if not tables:
        return None
    across = _across(tables[0])
    summary = tables[0]["summary"]
    stages = list(dict.fromkeys(row["stage"] for row in summary))
    cells = {(row["stage"], row[across]): row for row in summary}
    shared = [length for stage, length in cells if stage == stages[-1] and (stages[0], length) in cells]
    length = max(shared, default=max(length for stage, length in cells if stage == stages[-1]))
    first = cells.get((stages[0], length)) if len(stages) > 1 else None
    return {"length": length, "first": first, "last": cells[stages[-1], length], "video": across == "frames"}


def needle(data: RunData, name: str, results: Mapping[str, list[Row]]) -> Row:
    """What the page shows of one suite; lengths are in tokens, or in frames for needles in video."""
    rows, summary, across = results["rows"], results["summary"], _across(results)
    video = across == "frames"
    stages = list(dict.fromkeys(row["stage"] for row in summary))
    lengths = sorted({row[across] for row in summary})
    cells = {(row["stage"], row[across]): row for row in summary}
    trained = _trained_lengths(data)
    reached = {stage: _in_frames(rows, length) for stage, length in trained.items()} if video else trained
    key = list(data.needles).index(name)
    wrong = [row for row in rows if row["stage"] == stages[-1] and not row.get("correct")]
    return {
        "name": name,
        "video": video,
        "groups": _maps(rows, across, trained, reached, key),
        "figures": _figures(summary, across, key),
        "lengths": lengths,
        "table": [{"stage": s, "cells": [cells.get((s, length)) for length in lengths]} for s in stages],
        "wrong": [{**row, "length": row[across]} for row in sorted(wrong, key=lambda row: -row[across])[:5]],
        "last": stages[-1],
        "marked": any(lengths[0] <= reached.get(s, 0) < lengths[-1] for s in stages),
        "held_out": not any(
            suite.get("haystack")
            for suite in rows_of(data.table("config").get("evals"))
            if str(suite.get("name")).rpartition(":")[2] == "needle"
        ),
        "hidden": max((row.get("needles", 1) for row in rows), default=1),
        "asked": max((row["answer"].count(", ") + 1 for row in rows), default=1),
        "chance": summary[0]["chance"] if video else None,
        "gradient": ", ".join(figures.accuracy_colour(float(x)) for x in np.linspace(0, 1, 9)),
    }


def _is_video(results: Mapping[str, list[Row]]) -> bool:
    return any("frames" in row for row in results["summary"])


def _across(results: Mapping[str, list[Row]]) -> str:
    return "frames" if _is_video(results) else "length"


def _maps(
    rows: Sequence[Row], across: str, trained: Mapping[str, int], reached: Mapping[str, int], key: int
) -> list[Row]:
    """Heat maps of each stage, of what was answered and, where that was scored, of what was held for likeliest."""
    told = [("", rows, figures.share)]
    if across == "frames":
        scored = [row for row in rows if isinstance(row.get("choice"), str)]
        told = [("Answered right", rows, figures.share), ("Right by likelihood", scored, figures.chose_right)]
    groups = []
    for number_of, (label, found, value) in enumerate(told):
        maps = []
        for k, stage in enumerate(dict.fromkeys(row["stage"] for row in found)):
            figure = figures.heat_map(
                found, stage, title=_map_title(stage, trained), trained=reached.get(stage), named=False, across=across,
                value=value,
            )  # fmt: skip
            maps.append(Markup(figures.inline(figure, f"map-{key}-{number_of}-{k}")))
        if maps:
            groups.append({"label": label, "maps": maps})
    return groups if len(groups) > 1 else [{**group, "label": ""} for group in groups]


def _figures(summary: Sequence[Row], across: str, key: int) -> list[Markup]:
    """Accuracy by length; for needles in video beside chance, and by likelihood too where that was scored."""
    if across == "length":
        return [Markup(figures.inline(figures.accuracy_by_length(summary), f"accuracy-{key}"))]
    drawn = []
    for value, label in (("accuracy", "answered right"), ("choice_accuracy", "right by likelihood")):
        told = [row for row in summary if math.isfinite(number(row.get(value)))]
        if told:
            figure = figures.accuracy_by_length(
                told, across=across, value=value, label=label, chance=summary[0]["chance"]
            )
            drawn.append(Markup(figures.inline(figure, f"{value}-{key}".replace("_", "-"))))
    return drawn


def _in_frames(rows: Sequence[Row], length: int) -> int:
    """The most frames among ``rows`` that are no longer than ``length`` tokens."""
    return max((row["frames"] for row in rows if row["length"] <= length), default=0)


def _trained_lengths(data: RunData) -> dict[str, int]:
    """Stage → the longest length that had been trained by its end."""
    longest = data.table("start").get("seq_len")
    longest = longest if isinstance(longest, int) else 0
    known = {"base": longest} if longest else {}
    for row in data.schedule:
        longest = max(longest, row["seq_len"] if isinstance(row.get("seq_len"), int) else 0)
        known[str(row.get("name"))] = longest
    return known


def _map_title(stage: str, trained: Mapping[str, int]) -> str:
    length = trained.get(stage)
    if stage == "base":
        return f"base, trained to {length}" if length else "base"
    told = length is None or str(length) in stage or figures.tokens(length).lower() in stage.lower()
    return f"after {stage}" if told else f"after {stage}, {length}"
