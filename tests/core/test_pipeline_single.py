"""One plugin by name outside of a run: its options as ``-s`` gives them, and every mistake told."""

from __future__ import annotations

from typing import Any

import pytest

from lwm_core.errors import ConfigError, PluginError
from lwm_core.pipeline import make, plug


def test_options_come_from_overrides_and_what_they_are_laid_on(standin_here: Any) -> None:
    plugged = plug("eval", "tally", ["samples=7"], {"sample_seconds": 0.5, "samples": 2})
    assert plugged.label == "lwm-standin:tally" and plugged.options.model_dump() == {
        "samples": 7,
        "sample_seconds": 0.5,
    }
    assert type(make(plugged)).__name__ == "Tally"
    assert plug("eval", "lwm-standin:tally").options.model_dump()["samples"] == 4


def test_every_mistake_is_told_with_the_override(standin_here: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        plug("eval", "tally", ["samples=0", "sampels=3", "nonsense"])
    assert caught.value.problems == [
        "-s nonsense: expected KEY=VALUE with a dotted key, such as optimizer.clip_norm=0.5",
        "-s samples=0: expected a number greater than 0, got 0",
        "-s sampels=3: unknown option of 'tally' (lwm-standin 0.1.0); did you mean samples?",
    ]
    with pytest.raises(ConfigError, match="given by the command: samples: expected a whole number, got 'x'"):
        plug("eval", "tally", [], {"samples": "x"})
    with pytest.raises(PluginError, match="eval 'tallly' is unknown; did you mean 'tally'"):
        plug("eval", "tallly")
