"""The recipe of the page on pictures and video through the command, on codes that the encoder's own writer wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lwm_data")
writing = pytest.importorskip("lwm_vqgan.shards.writer")

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "train-on-video.md"
PLUGINS = {"LWM_PLUGINS": "lwm-standin,lwm-data"}
STANDIN = (
    "-s", "trainer.name=standin", "-s", "attention.name=standin", "-s", "model.hidden_size=8", "-s",
    "model.intermediate_size=16", "-s", "model.num_layers=1", "-s", "stages=[{seq_len=1024, theta=1e4, tokens=12288, "
    "batch_tokens=4096, lr=1.0}]",
)  # fmt: skip


@pytest.fixture
def recipe(lwm: Any) -> Path:
    """``seen.toml`` as the page shows it, four pictures' codes and their captions."""
    from lwm_core.shards import Settings
    from lwm_vqgan.media.files import Source

    folder: Path = lwm.cwd
    (folder / "seen.toml").write_text(re.search(r"```toml\n(name = .*?)```", PAGE.read_text(), re.DOTALL)[1])  # type: ignore[index]
    (folder / "codes").mkdir()
    writer = writing.ShardWriter(folder / "codes", Settings("a:b", "0" * 64, {}, 8192, 64, None, None, 4, 4))
    random = np.random.default_rng(0)
    for name in ("red", "green", "blue", "white"):
        writer.begin(Source(Path("x"), f"{name}.png", 1))
        writer.add(random.integers(0, 8192, (1, 256)), np.zeros(1))
        writer.count(1)
        writer.end(None)
    writer.commit(complete=True)
    (folder / "captions.tsv").write_text("".join(f"{n}.png\ta {n} one\n" for n in ("red", "green", "blue", "white")))
    return folder / "seen.toml"


def test_the_pages_recipe_runs(lwm: Any, recipe: Path) -> None:
    done = lwm("run", "seen.toml", "--out", "r", *STANDIN, **PLUGINS)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (lwm.cwd / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in rows] == [4096, 8192, 12288] and rows[-1]["loss"] < rows[0]["loss"]


def test_what_does_not_fit_is_one_line_with_its_place(lwm: Any, recipe: Path) -> None:
    """A model without vision ids, codes that are gone, and a template that is wrong: the recipe's line is told."""
    table = 1 + recipe.read_text().splitlines().index("[data]")
    for words, message in (
        (("-s", "model.vision_size=0"), f"seen.toml:{table}: vision source 'pictures': the model has no ids for codes"),
        (("-s", "data.sources.pictures.path=pictures"), "vision source 'pictures': pictures: is no folder of codes"),
        (("-s", "data.sources.pictures.templates.video='{text}'"), r"template 'video': its fields are {text}"),
    ):
        done = lwm("run", "seen.toml", "--out", "r", *STANDIN, *words, **PLUGINS)
        assert done.returncode in (1, 2) and done.stderr.count("\n") == 1 and message in done.stderr, done.stderr


def test_codes_of_another_encoder_than_the_runs_are_one_line(lwm: Any, recipe: Path) -> None:
    """The stand-in encoder has the checksum that the recipe's codes were written with; once they have another, no."""
    manifest = lwm.cwd / "codes" / "manifest.json"
    encoder = ("-s", "encoder.name=patches")
    done = lwm("run", "seen.toml", "--out", "r", *STANDIN, *encoder, **PLUGINS)
    assert done.returncode == 0, done.stderr
    manifest.write_text(manifest.read_text().replace("0" * 64, "5" * 64))
    done = lwm("run", "seen.toml", "--out", "s", *STANDIN, *encoder, **PLUGINS)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (lwm.cwd / "s").exists()
    assert "the codes of data source 'pictures' were made by a:b with 555555555555; name that encoder" in done.stderr
