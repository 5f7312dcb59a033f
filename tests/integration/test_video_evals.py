"""The recipe of the page on evaluating video through the command, with an encoder and a trainer that cost nothing."""

from __future__ import annotations

import json
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lwm_data")
pytest.importorskip("lwm_evals")
writing = pytest.importorskip("lwm_vqgan.shards.writer")

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "evaluate-video.md"
PLUGINS = {"LWM_PLUGINS": "lwm-standin,lwm-data,lwm-evals"}
STANDIN = (
    "-s", "trainer.name=standin", "-s", "attention.name=standin", "-s", "encoder.name=patches", "-s",
    "model.hidden_size=8", "-s", "model.intermediate_size=16", "-s", "model.num_layers=1", "-s",
    "stages=[{seq_len=256, theta=1e4, tokens=2048, batch_tokens=1024, lr=1.0}]",
)  # fmt: skip
WITHOUT_ENCODER = tuple(word for word, after in zip(STANDIN, (*STANDIN[1:], ""), strict=True)
                        if "encoder" not in word and "encoder" not in after)  # fmt: skip


@pytest.fixture
def recipe(lwm: Any) -> Path:
    """``look.toml`` as the page shows it, and codes of the stand-in encoder: one a frame."""
    from lwm_core.shards import Settings
    from lwm_vqgan.media.files import Source

    folder: Path = lwm.cwd
    (folder / "look.toml").write_text(re.search(r"```toml\n(name = .*?)```", PAGE.read_text(), re.DOTALL)[1])  # type: ignore[index]
    random = np.random.default_rng(0)
    for name, frames in (("codes", 9), ("held-out", 6)):
        (folder / name).mkdir()
        settings = Settings("lwm-standin:patches", "0" * 64, {}, 256, 16, None, None, 4, 4)
        writer = writing.ShardWriter(folder / name, settings)
        for video in ("a.mp4", "b.mp4"):
            writer.begin(Source(Path("x"), video, 1))
            writer.add(random.integers(0, 256, (frames, 1)), np.arange(frames) / 4)
            writer.count(frames)
            writer.end(4.0)
        writer.commit(complete=True)
    return folder / "look.toml"


def test_clips_that_a_source_holds_out_are_the_ones_evaluated_on(lwm: Any, recipe: Path) -> None:
    """Of two videos, by the run's own option; ``video-loss`` needs no folder then."""
    lines = recipe.read_text().split("[[evals]]")
    recipe.write_text(lines[0].replace("max_frames = 3", "held_out = 0.5") + '[[evals]]\nname = "video-loss"\n')
    done = lwm("run", "look.toml", *STANDIN, **PLUGINS)
    assert done.returncode == 0, done.stderr
    rows = json.loads((lwm.cwd / "runs" / "look" / "evals" / "video-loss.json").read_text())["rows"]
    assert {row["video"] for row in rows} == {min(("a.mp4", "b.mp4"), key=lambda n: sha256(n.encode()).digest())}


@pytest.mark.slow
def test_the_pages_recipe_is_run_evaluated_again_and_reported(lwm: Any, recipe: Path) -> None:
    done = lwm("run", "look.toml", *STANDIN, **PLUGINS)
    assert done.returncode == 0, done.stderr
    evals = lwm.cwd / "runs" / "look" / "evals"
    tables = {name: json.loads((evals / f"{name}.json").read_text()) for name in ("video-needle", "video-loss")}
    [needle] = tables["video-needle"]["summary"]
    assert (needle["frames"], needle["length"], needle["chance"], needle["samples"]) == (68, 255, 1 / 8, 40)
    losses = tables["video-loss"]["summary"]
    assert [(row["frames"], row["length"]) for row in losses] == [(1, 12), (2, 14), (4, 18)]
    assert all(0 < row["nats"] < 20 for row in losses)
    [kept] = json.loads((evals / "reconstruction.json").read_text())["summary"]
    assert kept["frames"] == 32 and 0 < kept["ssim"] < 1 and kept["psnr"] > 5
    before = {path.name: path.read_bytes() for path in evals.iterdir()}
    done = lwm("eval", "runs/look", "--suite", "video-loss", "--json", "--quiet", **PLUGINS)
    assert json.loads(done.stdout)["video-loss"] == losses, done.stderr
    assert before == {path.name: path.read_bytes() for path in evals.iterdir()}
    assert lwm("report", "runs/look", **PLUGINS).returncode == 0
    page = (lwm.cwd / "runs" / "look" / "report.html").read_text()
    for heading in ("Video needle", "Loss of the next frame", "Reconstruction"):
        assert f"<h2>{heading}</h2>" in page


def test_what_cannot_be_evaluated_is_one_line_before_the_first_step(lwm: Any, recipe: Path) -> None:
    text = recipe.read_text()
    manifest = lwm.cwd / "held-out" / "manifest.json"
    for change, message in (
        (lambda: recipe.write_text(text.replace('[encoder]\nname = "vqgan"\n', "")), "'video-needle' needs a vision"),
        (lambda: recipe.write_text(text.replace("held-out", "gone")), "video-loss: gone: is no folder of codes"),
        (lambda: recipe.write_text(text.replace("held-out", "codes")),
         "codes is trained on and none of its clips is held out; set held_out in its data source, or name a folder"),
        (lambda: manifest.write_text(manifest.read_text().replace("0" * 64, "7" * 64)),
         "held-out are of lwm-standin:patches 777777777777, but data source 'clips' trains on codes of"),
    ):  # fmt: skip
        recipe.write_text(text)
        change()
        words = STANDIN if "needs a vision" not in message else WITHOUT_ENCODER
        done = lwm("run", "look.toml", *words, **PLUGINS)
        assert done.returncode in (1, 2) and message in done.stderr, done.stderr
        assert all("look.toml:" in line for line in done.stderr.splitlines()) and not (lwm.cwd / "runs").exists()
