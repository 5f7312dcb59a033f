"""``lwm score``: the verb on a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import exp, log
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lwm_evals")

PLUGINS = "lwm-standin,lwm-evals"


def test_the_verb(lwm: Any, small: Callable[..., Path]) -> None:
    """A run's model, a text from a file and from standard input, as a table, JSON and a figure."""
    assert lwm("run", str(small()), "--out", "r", LWM_PLUGINS=PLUGINS).returncode == 0
    text = "And God said, Let there be light: and there was light. " * 5
    (lwm.cwd / "text.txt").write_text(text)
    done = lwm("score", "r", "text.txt", "--plot", "p.svg", LWM_PLUGINS=PLUGINS)
    assert done.returncode == 0, done.stderr
    assert "275 tokens in one context, perplexity" in done.stdout and "drawn: p.svg" in done.stdout
    assert "it was trained on" in done.stdout
    assert (lwm.cwd / "p.svg").read_text().count("<svg") == 1
    told = json.loads(lwm("score", "r", "text.txt", "--json", "--max-tokens", "100", LWM_PLUGINS=PLUGINS).stdout)
    assert told["tokens"] == 100 and told["bands"][-1]["stop"] == 100
    assert told["perplexity"] == pytest.approx(exp(told["nats"]))
    assert told["bits_per_byte"] == pytest.approx(told["nats"] * 99 / log(2) / 100)


WRONG = {
    "text.txt --max-tokens 1": "--max-tokens is 1; expected at least 2",
    "text.txt --plot p.png": "expected a name that ends with .svg",
    "nowhere.txt": "nowhere.txt: cannot be read: No such file or directory",
    "latin.txt": "latin.txt: not UTF-8 at byte 1",
    "short.txt": "short.txt: 1 tokens; expected at least 2",
}


def test_wrong_use_is_one_line(lwm: Any, small: Callable[..., Path]) -> None:
    assert lwm("run", str(small()), "--out", "r", LWM_PLUGINS=PLUGINS).returncode == 0
    for name, data in (("text.txt", b"light"), ("latin.txt", b"l\xefcht"), ("short.txt", b"l")):
        (lwm.cwd / name).write_bytes(data)
    for words, message in WRONG.items():
        done = lwm("score", "r", *words.split(), LWM_PLUGINS=PLUGINS)
        assert done.returncode in (1, 2) and done.stderr.count("\n") == 1 and message in done.stderr, done.stderr
    done = lwm("score", "none", "text.txt", LWM_PLUGINS=PLUGINS)
    assert done.returncode == 2 and "none is not a run" in done.stderr
