"""``docs/figures/plan.py``: the committed figures and their page are what the planner finds now, and drawn to scale."""

from __future__ import annotations

import json
import re
import runpy
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from plan_cases import llama, planned, stage

from lwm_plan.hardware import read_machine
from lwm_plan.job import Job
from lwm_plan.stage_plan import tried
from lwm_plan.transfers import by_axes

DOCS = Path(__file__).parents[3] / "docs"
SVG = "{http://www.w3.org/2000/svg}"

Scope = dict[str, Any]


@pytest.fixture(scope="module")
def scope() -> Scope:
    """The script's names."""
    return runpy.run_path(str(DOCS / "figures" / "plan.py"))


@pytest.fixture(scope="module")
def page() -> str:
    """The page in one line, as sentences run over several."""
    return " ".join((DOCS / "explanation" / "planning.md").read_text().split())


@pytest.mark.parametrize("name", ["plan-step.svg", "plan-longest.svg"])
def test_the_committed_figure_is_what_the_script_draws(scope: Scope, name: str) -> None:
    assert scope["FIGURES"][name]() == (DOCS / "assets" / name).read_text(encoding="utf-8")


def test_bars_are_as_long_as_their_seconds(scope: Scope) -> None:
    """Read from the committed file: widths of a bar add up to the step, and each colour is its part of it."""
    bars = {}
    for group in ET.parse(DOCS / "assets" / "plan-step.svg").getroot().iter(f"{SVG}g"):
        told = re.match(r"(\S+), (\S+), (paper|best)", str(group.findtext(f"{SVG}title")))
        assert told is not None
        bars[told.groups()] = {r.attrib["class"]: float(r.attrib["width"]) for r in group.iter(f"{SVG}rect")}
    assert len(bars) == 4 * 5 * 2
    for (machine, name, which), widths in bars.items():
        step = next(one for one in scope["steps"](machine) if one.stage.name == name)
        time = getattr(step, which).timing
        per_second = scope["BAR_W"] / step.paper.timing.seconds
        shown = sum(width for part, width in widths.items() if "hidden" not in part)
        assert shown == pytest.approx(time.seconds * per_second, abs=0.05)
        assert widths["attention"] == pytest.approx(time.attention * per_second, abs=0.01)
        sent = sum(width for part, width in widths.items() if part not in ("matrices", "attention"))
        assert sent == pytest.approx(sum(t.seconds for t in time.transfers) * per_second, abs=0.05)


def test_machines_of_one_panel_are_alike(scope: Scope) -> None:
    """H100 and H200 take the same times on the same meshes."""
    for first, *others in scope["MACHINES"]:
        for other in others:
            for one, two in zip(scope["steps"](first), scope["steps"](other), strict=True):
                assert one.best.mesh == two.best.mesh
                for this, that in ((one.paper, two.paper), (one.best, two.best)):
                    assert this.timing.seconds == pytest.approx(that.timing.seconds, rel=1e-3)  # the update, by HBM
                    assert this.timing.transfers == that.timing.transfers


@pytest.mark.parametrize(("device", "name", "remat"), [("v5p", "v5p-64", "attention"), ("h100", "h100x8", "offload")])
def test_the_longest_fits_and_the_next_does_not(scope: Scope, device: str, name: str, remat: str) -> None:
    """Against the planner's own search, by any strategy."""
    machine, job, lengths = read_machine(name), Job(llama(), remat=remat), scope["LENGTHS"]
    found = scope["longest"](device, machine.devices, remat)
    after = lengths[lengths.index(found) + 1]
    assert tried(job, stage(found, 1, "1,1,1,-1"), machine, room=1.0)
    assert not tried(job, stage(after, 1, "1,1,1,-1"), machine, room=1.0)


def test_the_page_has_the_table(scope: Scope, page: str) -> None:
    rows = scope["table"]()
    assert len(rows) == 20 and not [row for row in rows if row not in page]


def sent_row(row: dict[str, Any]) -> str:
    """A compiled step in the page's table: of each axis what is planned and compiled."""
    name = f"{row['group']} {row['stage']}{', offload' * (row['remat'] == 'offload')}"
    found = planned(row)
    axes = [
        f"{axis} {mine / 2**30:.1f} of {row['axes'][axis] / 2**30:.1f} ({mine / row['axes'][axis] - 1:+.1%})"
        for axis, mine in by_axes(found.timing.transfers).items()
    ]
    return f"| {name} | `{row['topology']}` | `{found.mesh}` | {', '.join(axes)} |"


def test_the_page_has_what_is_sent_beside_the_compilers(page: str) -> None:
    """Every axis of every compiled step."""
    rows = json.loads((DOCS / "benchmarks" / "aot.json").read_text())["rows"]
    assert not [row["stage"] for row in rows if sent_row(row) not in page]
    (alone,) = (row for row in rows if row["stage"] == "256K" and row["group"] == "text")
    assert (
        f"{alone['sent']['collective-permute']['bytes'] / 2**30:.0f} GiB of permutes at 256K, where `sp` is 1" in page
    )


def test_the_page_says_what_the_planner_finds(scope: Scope, page: str) -> None:
    """Every figure of the text, filled in anew."""
    at = {(m, s.stage.name): s for m in ("v4-512", "v5p-512", "h100x64") for s in scope["steps"](m)}
    v4 = {name: at["v4-512", name] for name in ("32K", "128K", "256K", "1M")}
    gpu = {name: at["h100x64", name] for name in ("256K", "1M")}

    def sent(found: Any, what: str) -> Any:
        return next(one for one in found.timing.transfers if one.what == what)

    def share(found: Any) -> str:
        return f"{sent(found, 'stream').exposed / found.timing.seconds:.0%}"

    def faster(step: Any) -> str:
        return f"{step.paper.timing.seconds / step.best.timing.seconds:.2f}"

    time, ring = v4["1M"].paper.timing, sent(v4["1M"].best, "attention")
    wide, narrow, between = (sent(v4[name].paper, "stream") for name in ("256K", "32K", "128K"))
    grown = (v4["256K"].best.memory.total - v4["256K"].paper.memory.total) / 2**30
    row = {device: dict(scope["curve"](device, "attention")) for device in ("v5p", "h100")}
    offload = dict(scope["curve"]("h100", "offload"))
    told = scope["tokens"]
    for sentence in (
        f"Matrix products take {time.matrices:.2f} s on v4-512",
        f"attention takes {v4['32K'].paper.timing.attention:.2f} s at 32K and {time.attention:.2f} s at 1M, "
        f"{time.attention / time.seconds:.0%} of the step",
        f"that holds on v4-512: {narrow.seconds:.2f} s",
        f"takes {between.seconds:.2f} s, and {between.exposed:.2f} s of a step at 128K hide behind nothing",
        f"it takes {wide.seconds:.2f} s, of which {wide.exposed:.2f} s are exposed: "
        f"{share(v4['256K'].paper)} of the step at 256K, {share(v4['1M'].paper)} at 1M",
        f"On v5p-512 it is {sent(at['v5p-512', '256K'].paper, 'stream').exposed:.2f} s",
        f"{sent(gpu['256K'].paper, 'stream').exposed:.2f} s of a step are exposed: {share(gpu['256K'].paper)} of it",
        f"mesh `{v4['1M'].best.mesh}`, keys and values travel for {ring.seconds:.2f} s, and {ring.exposed:.2f} s of",
        f"step is {faster(v4['256K'])} times as fast at 256K and {faster(v4['1M'])} times at 1M",
        f"On 64 H100 it is {faster(gpu['256K'])} times at 256K, where `{gpu['256K'].best.mesh}`",
        f"and {faster(gpu['1M'])} times at 1M, with `{gpu['1M'].best.mesh}`",
        f"arrays come to {grown:.2f} GiB a device at 256K",
        f"8 of v5p have room for {told(row['v5p'][8])} tokens, 256 for {told(row['v5p'][256])}; 8 of H100 for "
        f"{told(row['h100'][8])}, 256 for {told(row['h100'][256])}",
        f"8 H100 hold {told(offload[8])}, 256 hold {told(offload[256])}",
        f"the TPU compiler has taken, {told(scope['longest_compiled']())} tokens",
    ):
        assert sentence in page, sentence
    assert sent(v4["256K"].best, "stream").exposed == 0
    assert all(faster(at[m, "32K"]) == "1.00" for m in ("v4-512", "v5p-512"))
    assert f"At 128K the other is {faster(v4['128K'])} and {faster(at['v5p-512', '128K'])} times as fast" in page
