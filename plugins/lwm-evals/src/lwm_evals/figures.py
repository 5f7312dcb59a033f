"""Matplotlib figures of a run, as SVG that follows the page's colours.

Figures are drawn in the light palette. In a page, every palette colour becomes a CSS variable (so that dark mode needs
no second figure), text takes the page's font, and ids get a prefix, for many figures share one document.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from lwm_evals.score import Score

INK, MUTED, LINE, BAND, ACCENT, PLAIN = "#1d2228", "#69727d", "#dfe3e8", "#f3f5f7", "#17738c", "#98a1ab"
VARIABLES = {
    INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)", BAND: "var(--band)", ACCENT: "var(--accent)",
    PLAIN: "var(--plain)",
}  # fmt: skip

ACCURACY = LinearSegmentedColormap.from_list("accuracy", ["#b8493c", "#e0b45c", "#2b8a80"])
"""Accuracy 0 → 1; told apart in light and dark mode and by most people who are colour-blind."""

_STYLE: dict[Any, Any] = {
    "font.size": 9.0, "text.color": INK, "text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "lwm",
    "axes.edgecolor": LINE, "axes.labelcolor": MUTED, "axes.titlecolor": INK, "axes.linewidth": 0.8,
    "axes.spines.top": False, "axes.spines.right": False, "xtick.color": LINE, "ytick.color": LINE,
    "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED, "xtick.major.size": 3.0, "ytick.major.size": 0.0,
    "axes.titlesize": 10.0, "axes.titleweight": "bold", "lines.solid_capstyle": "round", "legend.frameon": False,
    "figure.facecolor": "none", "axes.facecolor": "none",
}  # fmt: skip

Rows = Sequence[Mapping[str, Any]]


def standalone(figure: Figure) -> bytes:
    """The figure as a file of its own, in the light palette on white."""
    figure.patch.set_facecolor("white")
    return _svg(figure)


def inline(figure: Figure, key: str) -> str:
    """The figure as an ``<svg>`` element for a page that sets the CSS variables; ``key`` is unique in the page."""
    text = _svg(figure).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'\bid="([^"<>]*)"', rf'id="{key}-\1"', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{key}-", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    return text.strip()


AXES: Mapping[str, str] = {"length": "context, tokens", "frames": "clip, frames"}
"""What rows may be told apart by, across, and how the axis is called."""


def heat_map(
    rows: Rows,
    stage: str,
    *,
    title: str,
    trained: int | None = None,
    named: bool = True,
    across: str = "length",
    value: Callable[[Mapping[str, Any]], float] | None = None,
) -> Figure:
    """Accuracy of one stage in every (depth, length) cell: lengths across, depths from the text's start down.

    Args:
        rows: rows of a needle suite, of any stages; all their lengths and depths are shown, so that maps compare.
        stage: whose cells are filled.
        title: over the map.
        trained: longest length the model was trained at by then; a dashed line marks what lies beyond.
        named: write the axes' names; maps side by side say them once for all.
        across: what lengths are, one of :data:`AXES`.
        value: what is shown of a row, in [0, 1]; :func:`share` by default.
    """
    lengths = sorted({row[across] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    cells: dict[tuple[int, float], list[float]] = {}
    for row in rows:
        if row["stage"] == stage:
            cells.setdefault((row[across], row["depth"]), []).append((value or share)(row))
    with rc_context(_STYLE):
        figure = Figure(figsize=(2.9, 2.75) if named else (2.25, 2.2), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(brief(title, 26), loc="left", pad=8)
        for x, length in enumerate(lengths):
            for y, depth in enumerate(depths):
                found = cells.get((length, depth))
                colour = accuracy_colour(float(np.mean(found))) if found else BAND
                axes.add_patch(Rectangle((x + 0.03, y + 0.04), 0.94, 0.92, facecolor=colour, linewidth=0))
        if trained is not None and lengths and lengths[0] <= trained < lengths[-1]:
            axes.axvline(sum(length <= trained for length in lengths), color=INK, linewidth=1.2, dashes=(3, 2))
        axes.set(xlim=(0, len(lengths)), ylim=(len(depths), 0))
        if named:
            axes.set(xlabel=AXES[across], ylabel="depth of the needle")
        axes.set_xticks(np.arange(len(lengths)) + 0.5, [tokens(length) for length in lengths])
        shown = sorted({0, (len(depths) - 1) // 2, len(depths) - 1})
        axes.set_yticks([y + 0.5 for y in shown], [f"{depths[y]:.0%}" for y in shown])
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return figure


def accuracy_by_length(
    summary: Rows,
    *,
    across: str = "length",
    value: str = "accuracy",
    label: str = "needle accuracy",
    chance: float | None = None,
) -> Figure:
    """``value`` by length, a line a stage (see :func:`_by_stage`); a dotted line where guessing stands."""
    with rc_context(_STYLE):
        figure, axes = _by_stage(summary, across, value)
        axes.set(ylim=(0, 1.02), xlabel=AXES[across], ylabel=label)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        if chance is not None:
            axes.axhline(chance, color=MUTED, linewidth=1.0, linestyle=":", zorder=1)
            axes.annotate("chance", (0, chance), xycoords=("axes fraction", "data"), xytext=(3, 3),
                          textcoords="offset points", color=MUTED, fontsize=8.0)  # fmt: skip
        return figure


def loss_by_frames(summary: Rows) -> Figure:
    """Nats a code of a clip's next frame by the frames before it, a line a stage (see :func:`_by_stage`)."""
    with rc_context(_STYLE):
        figure, axes = _by_stage(summary, "frames", "nats")
        values = [row["nats"] for row in summary]
        low, high = min(values), max(values)
        margin = 0.1 * (high - low) or 0.1
        axes.set(ylim=(low - margin, high + margin), xlabel="frames before", ylabel="loss, nats a code")
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        return figure


def _by_stage(summary: Rows, across: str, value: str) -> tuple[Figure, Axes]:
    """A line a stage: the base grey and dashed, later stages in ever stronger colour."""
    stages = list(dict.fromkeys(row["stage"] for row in summary))
    lengths = sorted({row[across] for row in summary})
    figure = Figure(figsize=(4.4, 2.75), layout="constrained")
    axes = figure.add_subplot()
    for k, stage in enumerate(stages):
        points = sorted((row[across], row[value]) for row in summary if row["stage"] == stage)
        first = k == 0 and len(stages) > 1
        axes.plot(
            *zip(*points, strict=True), marker="o", markersize=3.5, linewidth=1.6, label=brief(stage),
            clip_on=False, color=PLAIN if first else ACCENT, linestyle="--" if first else "-",
            alpha=1.0 if first else 0.3 + 0.7 * (k / max(1, len(stages) - 1)), zorder=3,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [tokens(length) for length in lengths], minor=False)
    axes.minorticks_off()
    _grid(axes)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), labelcolor=MUTED, fontsize=8.5, handlelength=1.6)
    return figure, axes


def curve(
    stages: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    label: str,
    *,
    size: tuple[float, float],
    smooth: bool = False,
    named: bool = False,
    from_zero: bool = False,
) -> Figure:
    """Values over tokens seen, a band a stage: raw values pale, and smoothed within each stage where asked.

    Args:
        stages: (name, tokens seen, values) of each, in order.
        label: what the values are.
        size: width and height in inches.
        smooth: draw the raw values pale and their running mean strong.
        named: write the stages' names over their bands.
        from_zero: begin the axis at 0.
    """
    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        left = 0.0
        for k, (name, x, y) in enumerate(stages):
            if k % 2 == 0:
                axes.axvspan(left, x[-1], facecolor=BAND, linewidth=0, zorder=0)
            if named:
                axes.text((left + x[-1]) / 2, 1.02, brief(name), transform=axes.get_xaxis_transform(), ha="center",
                          va="bottom", color=MUTED, fontsize=8.5)  # fmt: skip
            left = x[-1]
            px, py = thin(x, y)
            if smooth:
                axes.plot(px, py, color=ACCENT, alpha=0.28, linewidth=0.9)
                px, py = thin(x, running_mean(y))
            axes.plot(px, py, color=ACCENT, linewidth=1.8, marker="o" if len(px) == 1 else "", markersize=3.5)
        every = np.concatenate([np.asarray(y, dtype=float) for _, _, y in stages])
        low, high = np.nanpercentile(every, [0, 99.7])
        axes.set(xlim=(0, left), xlabel="tokens seen", ylabel=label)
        axes.set_ylim(0 if from_zero else low - 0.05 * (high - low or 1), high + 0.08 * (high - low or 1))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens(value)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens(value) if value >= 1e4 else f"{value:g}"))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_locator(MaxNLocator(8 if size[0] > 6 else 4, steps=[1, 2, 5, 10]))
        _grid(axes)
        return figure


def perplexity_by_position(found: Score, trained: int) -> Figure:
    """Perplexity of a text's tokens over their position in it; a dashed line marks the length trained at.

    Where it rises tenfold, as it does far beyond what was trained, the axis is logarithmic, or the rest would lie flat.
    """
    with rc_context(_STYLE):
        figure = Figure(figsize=(5.6, 2.75), layout="constrained")
        axes = figure.add_subplot()
        bands = [band for band in found.bands if np.isfinite(band.perplexity)]
        for band in bands:
            axes.hlines(band.perplexity, band.start, band.stop, color=ACCENT, linewidth=2.2)
        middles = [(band.start * band.stop) ** 0.5 for band in bands]
        axes.plot(middles, [band.perplexity for band in bands], color=ACCENT, alpha=0.45, linewidth=1.2)
        if trained < found.tokens:
            axes.axvline(trained, color=INK, linewidth=1.2, dashes=(3, 2))
            axes.annotate(f"trained at {tokens(trained)}", (trained, 1), xycoords=("data", "axes fraction"),
                          xytext=(4, -8), textcoords="offset points", color=MUTED, fontsize=8.5)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set(xlim=(1, found.tokens), xlabel="position in the text, tokens", ylabel="perplexity")
        found_at = [band.perplexity for band in bands] or [1.0]
        if max(found_at) > 10 * min(found_at):
            axes.set_yscale("log")
            axes.set_ylim(0.7 * min(found_at), 1.6 * max(found_at))
            axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 3.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        else:
            axes.set_ylim(0, 1.15 * max(found_at))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens(value)))
        axes.minorticks_off()
        _grid(axes)
        return figure


def running_mean(values: Sequence[float]) -> list[float]:
    """Exponential mean over about a twentieth of the values, without the pull towards its start."""
    decay = 1.0 - 1.0 / max(1.0, min(50.0, len(values) / 20))
    mean, weight, result = 0.0, 0.0, []
    for value in values:
        if np.isfinite(value):
            mean = decay * mean + (1 - decay) * value
            weight = decay * weight + (1 - decay)
        result.append(mean / weight if weight else float("nan"))
    return result


def thin(x: Sequence[float], y: Sequence[float], most: int = 600) -> tuple[list[float], list[float]]:
    """At most about ``most`` points: means of equal runs of points."""
    run = -(-len(x) // most)
    starts = range(0, len(x), run)
    return [float(np.mean(x[i : i + run])) for i in starts], [float(np.mean(y[i : i + run])) for i in starts]


def accuracy_colour(accuracy: float) -> str:
    """The colour of an accuracy in [0, 1] as ``#rrggbb``."""
    return to_hex(ACCURACY(accuracy))


def share(row: Mapping[str, Any]) -> float:
    """Share of what was asked for that a row of ``needle.json`` (or ``video-needle.json``) retrieved."""
    return float(row["retrieved"]) / (str(row["answer"]).count(", ") + 1)


def chose_right(row: Mapping[str, Any]) -> float:
    """Whether a row of ``video-needle.json`` held the right word for the likeliest."""
    return float(row["choice"] == row["answer"])


def brief(name: str, most: int = 16) -> str:
    """A name that fits a figure; tables have it whole."""
    return name if len(name) <= most else name[: most - 1] + "…"


def tokens(value: float) -> str:
    """A count in few signs: powers of two as people name contexts (``4K``), others in thousands or millions."""
    if value >= 1024 and value % 1024 == 0 and (int(value) & (int(value) - 1)) == 0:
        return f"{value / 1024:g}K" if value < 2**20 else f"{value / 2**20:g}M"
    for size, sign in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{sign}"
    return f"{value:g}"


def _grid(axes: Axes) -> None:
    axes.grid(axis="y", color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)


def _svg(figure: Figure) -> bytes:
    buffer = BytesIO()
    with rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return buffer.getvalue()
