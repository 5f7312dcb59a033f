"""The report: what it shows, that it is complete in itself, that no text breaks out, that any part may be missing."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from lwm_core.errors import UsageError
from lwm_evals import write_report
from lwm_evals.figures import thin, tokens
from lwm_evals.hooks import ReportHooks
from lwm_evals.report.collect import read_run
from lwm_evals.report.needles import needle
from lwm_evals.report.text import count, duration, flatten, percent, shorten

MakeRun = Callable[..., Path]

HOSTILE = '<script>alert("1")</script>"\'</style></svg></title><img src=x onerror=alert(2)>$\\frac{1}$ &amp; {{ 7*7 }}'

VOID = {"meta", "br", "img", "link"}


class Page(HTMLParser):
    """Elements, text, attributes, and whether every element is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.text = ""
        self.headings: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)

    def ids(self) -> list[str]:
        return [value for _, attrs in self.tags if (value := attrs.get("id"))]


def read(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_it_shows_every_part(make_run: MakeRun) -> None:
    folder = make_run()
    page = read(folder)
    assert (folder / "report.html").exists()
    for expected in (
        "256 → 4,096 tokens", "16× longer", "Needle accuracy at 4,096 tokens", "100 samples each", "Needle retrieval",
        "base, trained to 256", "after 4096", "n=100", "Training", "2 min", "31%", "Samples", "In the beginning",
        "went up to the house of God", "212 tokens/s", "Schedule", "2,560,000", "Plugins", "lwm-jax-ring",
        "Resolved configuration", "quickstart.toml:3", "attention = jax-ring", "rejected torch-ring", "Versions",
        "0.10.2", "Machine", "EPYC", "4.21M",
    ):  # fmt: skip
        assert expected in " ".join(page.text.split()), expected
    assert sum(tag == "svg" for tag, _ in page.tags) == 5 + 1 + 2 + 2  # maps, accuracy, loss twice, two small ones
    assert page.wrong == [] and page.open == []
    assert len(page.ids()) == len(set(page.ids()))


def test_it_says_base_and_final_accuracy(make_run: MakeRun) -> None:
    folder = make_run()
    summary = json.loads((folder / "evals" / "needle.json").read_text())["summary"]
    base, final = (
        next(row["accuracy"] for row in summary if (row["stage"], row["length"]) == (stage, 4096))
        for stage in ("base", "4096")
    )
    text = " ".join(read(folder).text.split())
    assert f"{base:.0%} → {final:.0%} base → 4096" in text


def assert_self_contained(page: Page) -> None:
    for tag, attrs in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form"}, tag
        assert not [name for name in attrs if name.startswith("on")], (tag, attrs)
        for name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
            value = attrs.get(name)
            inside = tag == "img" and name == "src" and str(value).startswith("data:image/png;base64,")
            assert value is None or value.startswith("#") or inside, (tag, name, value)
        assert "url(" not in (attrs.get("style") or "").replace("url(#", ""), attrs


def test_it_is_complete_in_itself(make_run: MakeRun) -> None:
    folder = make_run()
    assert_self_contained(read(folder))
    style = (folder / "report.html").read_text().split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style and "@font-face" not in style
    assert "prefers-color-scheme: dark" in style


def test_hostile_text_stays_text(make_run: MakeRun) -> None:
    plain, page = (read(make_run(name, hostile=text, vision=True)) for name, text in (("a", ""), ("b", HOSTILE)))
    assert_self_contained(page)
    assert page.wrong == [] and page.open == []
    counts = [[tag for tag, _ in p.tags].count("style") for p in (plain, page)]
    assert counts[0] == counts[1] > 0
    assert page.text.count('<script>alert("1")</script>') >= 10
    assert "{{ 7*7 }}" in page.text and "49" not in page.text.split("{{ 7*7 }}")[0][-20:]
    assert len(page.ids()) == len(set(page.ids()))


@pytest.mark.parametrize("part", ["run.json", "metrics.jsonl", "evals", "samples"])
def test_any_part_may_be_missing(make_run: MakeRun, part: str) -> None:
    folder = make_run()
    path = folder / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = read(folder)
    assert page.wrong == [] and page.open == []
    heading = {"run.json": "Schedule", "metrics.jsonl": "Training", "evals": "Needle retrieval", "samples": "Samples"}
    for name, word in heading.items():
        assert (word in page.headings) == (name != part), (part, name)


@pytest.mark.parametrize("part", ["run.json", "evals/needle.json", "samples/final.json"])
@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "3", '"text"', '{"rows": [1, {}], "stages": {"a": 1}}', "\x00"]
)
def test_a_damaged_part_does_not_stop_it(make_run: MakeRun, part: str, content: str) -> None:
    folder = make_run()
    (folder / part).write_text(content)
    page = read(folder)
    assert page.wrong == [] and page.open == []
    if content in ("", "{", "\x00"):
        assert f"{Path(part).name} cannot be read" in page.text


def test_incomplete_needle_rows_are_told(make_run: MakeRun) -> None:
    folder = make_run()
    path = folder / "evals" / "needle.json"
    table = json.loads(path.read_text())
    del table["rows"][3]["retrieved"]
    table["rows"][5]["length"] = -4
    table["summary"][0]["accuracy"] = float("nan")
    path.write_text(json.dumps(table))
    text = read(folder).text
    assert "needle.json: 2 of 660 rows are not complete" in text
    assert "needle.json: 1 of 25 summary are not complete" in text


def test_a_run_that_is_not_finished_says_so(make_run: MakeRun) -> None:
    folder = make_run()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:115]) + lines[115][:30])
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**run, "status": "stopped"}))
    text = read(folder).text
    assert "not finished (stopped): 50% of its steps are done" in text
    (folder / "metrics.jsonl").write_text("".join(lines))
    assert "not finished" not in read(folder).text


def test_one_stage_one_step_and_nothing_else(tmp_path: Path) -> None:
    row = {"step": 1, "stage": "512", "stage_index": 0, "tokens": 512, "loss": 5.5, "mfu": None}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    page = read(tmp_path)
    assert "5.500 → 5.500" in page.text and page.wrong == []
    (tmp_path / "metrics.jsonl").write_text(json.dumps({**row, "loss": None, "tokens": "many"}) + "\n")
    assert "Training" in read(tmp_path).text


def test_other_suites_are_tables(make_run: MakeRun) -> None:
    folder = make_run()
    rows = [{"stage": "base", "task": "vt", "score": 0.25}, {"stage": "4096", "task": "vt", "extra": True}]
    (folder / "evals" / "ruler.json").write_text(json.dumps({"summary": rows}))
    shutil.copy(folder / "evals" / "needle.json", folder / "evals" / "needle-multi.json")
    page = read(folder)
    text = " ".join(page.text.split())
    assert "ruler" in page.headings and "stagetaskscoreextra" in text and "basevt0.25–4096vt–true" in text
    assert "Needle retrieval (needle-multi)" in text and len(page.ids()) == len(set(page.ids()))


def test_it_shows_the_suites_of_video_and_pictures(make_run: MakeRun) -> None:
    folder = make_run(vision=True)
    page = read(folder)
    assert_self_contained(page)
    assert page.wrong == [] and page.open == [] and len(page.ids()) == len(set(page.ids()))
    assert page.headings[:5] == [
        "Needle retrieval", "Video needle", "Loss of the next frame", "Continuation of a clip", "Reconstruction",
    ]  # fmt: skip
    summary = json.loads((folder / "evals" / "video-needle.json").read_text())["summary"]
    cell = next(row for row in summary if (row["stage"], row["frames"]) == ("2048", 113))
    losses = json.loads((folder / "evals" / "video-loss.json").read_text())["summary"]
    text = " ".join(page.text.split())
    for expected in (
        "Needle accuracy at 4,096 tokens", "is right in 12.5% of all cases", "Answered right", "Right by likelihood",
        f"{percent(cell['accuracy'])}likeliest {percent(cell['choice_accuracy'])}n=16", "clip, frames", "chance",
        "frames before", "6.24 nats", f"{losses[-1]['nats']:.3f}", "24.18 dB", "17.02 dB", "0.812", "431 (84.2%)",
        "a row a stage: 1024, 2048, 4096.", "1024412.3%14.00 dB24.18 dB15.50 dB",
    ):  # fmt: skip
        assert expected in text, expected
    # maps, accuracy; maps twice, accuracy twice; the curve; loss twice and two small ones
    assert sum(tag == "svg" for tag, _ in page.tags) == (5 + 1) + (2 * 5 + 2) + 1 + (2 + 2)
    shown = [base64.b64decode(str(attrs["src"]).partition(",")[2]) for tag, attrs in page.tags if tag == "img"]
    files = ("video-continuation", "reconstruction")
    assert shown == [(folder / "evals" / f"{name}.png").read_bytes() for name in files]
    assert (folder / "report.html").stat().st_size < 1_000_000


def test_a_video_needles_dashed_line_stands_where_training_ended(make_run: MakeRun) -> None:
    """8 frames of 17 tokens and what stands beside them take 255: the base was trained to 256, and 23 are beyond."""
    folder = make_run(vision=True)
    data = read_run(folder)
    drawn = needle(data, "video-needle", data.needles["video-needle"])
    assert drawn["lengths"] == [8, 23, 53, 113, 233] and drawn["marked"] and drawn["chance"] == 1 / 8
    marks = [str(figure).count("stroke-dasharray") for figure in drawn["groups"][0]["maps"]]
    assert marks == [1, 1, 1, 1, 0], "the last stage was trained on all"
    assert [group["label"] for group in drawn["groups"]] == ["Answered right", "Right by likelihood"]


def test_a_run_of_video_alone_is_headed_by_its_frames_and_may_lack_likelihoods(make_run: MakeRun) -> None:
    folder = make_run(vision=True)
    (folder / "evals" / "needle.json").unlink()
    path = folder / "evals" / "video-needle.json"
    table = json.loads(path.read_text())
    for row in table["rows"]:
        row["choice"] = None
    for row in table["summary"]:
        del row["choice_accuracy"]
    path.write_text(json.dumps(table))
    for name in ("reconstruction", "video-continuation"):
        (folder / "evals" / f"{name}.png").write_bytes(b"<svg onload=alert(1)>")
    (folder / "evals" / "video-loss.json").write_text(
        json.dumps({"summary": [{"stage": "base", "frames": 1, "nats": "much"}]})
    )
    page = read(folder)
    text = " ".join(page.text.split())
    assert "Video needle accuracy at 233 frames" in text and "likelihood" not in text and "likeliest" not in text
    assert "reconstruction.png is no PNG" in text and "video-continuation.png is no PNG" in text
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert "video-loss.json: 1 of 1 summary are not complete" in text and "Loss of the next frame" not in text
    assert "Reconstruction" in page.headings and page.wrong == [] and page.open == []


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a run") as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_the_hook_writes_the_report(make_run: MakeRun) -> None:
    from lwm_core.registry import HookManager

    folder = make_run()
    hooks = HookManager()
    hooks.register(ReportHooks(), "lwm-evals:report")
    assert hooks.check_pending() == []
    assert hooks.hook.lwm_report(run=SimpleNamespace(folder=folder)) == folder / "report.html"
    assert (folder / "report.html").stat().st_size < 1_000_000


def test_the_page_is_the_same_each_time(make_run: MakeRun) -> None:
    folder = make_run()
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (tokens(4096), "4K"), (tokens(1 << 20), "1M"), (tokens(512), "512"), (tokens(3_768_320), "3.77M"),
        (tokens(5000), "5k"), (duration(0.2134), "0.213 s"), (duration(59.9999), "60 s"), (duration(312), "5 min 12 s"),
        (duration(7200), "2 h"), (duration(11_040), "3 h 4 min"), (duration(200_000), "2 d 7 h"), (duration(None), "–"),
        (percent(0.987), "98.7%"), (percent(1), "100%"), (percent("x"), "–"), (count(1234567), "1,234,567"),
        (shorten("a" * 10), "a" * 10), (flatten({"a": {"b": [1, 2]}, "c": [{"d": None}], "e": {}}),
         [("a.b", "[1, 2]"), ("c[0].d", "–"), ("e", "{}")]),
    ],
)  # fmt: skip
def test_values_read_well(made: object, expected: object) -> None:
    assert made == expected


def test_thinning_keeps_the_mean() -> None:
    x, y = thin(list(range(1200)), [float(i % 2) for i in range(1200)], most=600)
    assert len(x) == len(y) == 600 and set(y) == {0.5}
