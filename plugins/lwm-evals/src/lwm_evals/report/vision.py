"""What the page shows of video and pictures: loss by frames before, what became of pictures, how clips go on."""

from __future__ import annotations

import base64
import math
from typing import Any

from markupsafe import Markup

from lwm_evals import figures
from lwm_evals.report.collect import RunData, number

Row = dict[str, Any]


def video_loss(data: RunData, name: str) -> Row:
    """The curve by stage, and the same as a table."""
    summary = data.losses[name]
    key = list(data.losses).index(name)
    stages = list(dict.fromkeys(row["stage"] for row in summary))
    frames = sorted({row["frames"] for row in summary})
    cells = {(row["stage"], row["frames"]): row for row in summary}
    return {
        "name": name,
        "figure": Markup(figures.inline(figures.loss_by_frames(summary), f"video-loss-{key}")),
        "frames": frames,
        "table": [{"stage": s, "cells": [cells.get((s, count)) for count in frames]} for s in stages],
        "uniform": summary[0]["uniform"],
        "samples": max(row["samples"] for row in summary),
    }


def reconstruction(data: RunData, name: str) -> Row:
    """The picture as a data URL, and the numbers as they read."""
    row, picture = data.reconstructions[name]
    facts = [
        ("frames", f"{row['frames']:,}"),
        ("PSNR", _decibel(row.get("psnr"))),
        ("worst frame", _decibel(row.get("worst_psnr"))),
        ("SSIM", f"{row['ssim']:.3f}"),
        ("codes used", f"{row['codes_used']:,} ({row['usage']:.1%})"),
        ("perplexity of the codes", f"{row['perplexity']:,.0f}"),
    ]
    if row.get("exact"):
        facts.append(("came back to the bit", str(row["exact"])))
    return {"name": name, "facts": facts, "picture": _url(picture)}


def continuation(data: RunData, name: str) -> Row:
    """The picture as a data URL, and a row a stage."""
    summary, picture = data.continuations[name]
    stages = [
        {
            "stage": row["stage"], "written": f"{row['written']:,}", "codes_equal": f"{row['codes_equal']:.1%}",
            **{key: _decibel(row.get(key)) for key in ("psnr", "encoder_psnr", "still_psnr")},
        }
        for row in summary
    ]  # fmt: skip
    return {"name": name, "stages": stages, "picture": _url(picture)}


def _url(picture: bytes | None) -> str | None:
    return None if picture is None else "data:image/png;base64," + base64.b64encode(picture).decode()


def _decibel(value: object) -> str:
    found = number(value)
    return f"{found:.2f} dB" if math.isfinite(found) else "∞"
