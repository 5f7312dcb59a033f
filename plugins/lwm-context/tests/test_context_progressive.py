"""The schedule `progressive`: LWM's own tables, rules, one value or one a stage, and every wrong use."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lwm_context.options import PER_STAGE_KEYS, ProgressiveOptions
from lwm_context.progressive import progressive
from lwm_context.stages import length_name
from lwm_core.config import StageTable, problems_from, read_source
from lwm_core.errors import ConfigError
from lwm_core.mesh import resolve_mesh
from lwm_core.model import preset
from lwm_core.protocols import Stage, StartModel
from lwm_core.rope import RopeSpec
from lwm_core.rope_scalings import llama3, yarn
from lwm_core.vocab import Vocabulary

MODEL = preset("7b", Vocabulary(32_000))  # head dim 128
BASIC: dict[str, Any] = {"tokens": 1 << 20, "batch_tokens": 1 << 16, "lr": 1e-4}


def stages(start: StartModel | None = None, **options: Any) -> tuple[Stage, ...]:
    table = {**BASIC, **options}
    return progressive(ProgressiveOptions.model_validate(table), start or StartModel(MODEL))


def test_lwm_text_stages() -> None:
    """LWM's table 11: five stages, 4M tokens a batch, 4e-5 constant."""
    billion = 10**9
    schedule = stages(
        StartModel(preset("7b", Vocabulary(32_000)), seq_len=4096, rope=RopeSpec(10_000.0)),
        lengths=[2**15, 2**17, 2**18, 2**19, 2**20],
        theta=[1e6, 1e7, 1e7, 2.5e7, 5e7],
        tokens=[int(4.8 * billion), 12 * billion, 12 * billion, 3 * billion, int(1.8 * billion)],
        batch_tokens=2**22,
        lr=4e-5,
        warmup_steps=[100, 200, 200, 50, 25],
        mesh=["1,-1,4,1", "1,-1,8,1", "1,-1,16,1", "1,-1,16,2", "1,-1,16,4"],
    )
    assert [s.name for s in schedule] == ["32K", "128K", "256K", "512K", "1M"]
    assert [s.rope for s in schedule] == [RopeSpec(t) for t in (1e6, 1e7, 1e7, 2.5e7, 5e7)]
    assert [s.rows for s in schedule] == [128, 32, 16, 8, 4]
    # The paper's steps are of rounded tokens (1200 steps of 4 · 2^20 tokens are 5.03B, written 4.8B): within 5%.
    assert [s.steps for s in schedule] == [1145, 2862, 2862, 716, 430]
    assert [s.steps for s in schedule] == pytest.approx([1200, 3000, 3000, 720, 450], rel=0.05)
    assert all(s.lr == s.lr_at(s.steps - 1) == 4e-5 for s in schedule)
    assert [s.lr_at(s.warmup_steps - 1) for s in schedule] == pytest.approx([4e-5] * 5)
    assert [s.lr_at(0) for s in schedule] == pytest.approx([4e-7, 2e-7, 2e-7, 8e-7, 1.6e-6])
    # A v4-512 is 256 devices.
    assert [tuple(resolve_mesh(s.mesh, 256).values()) for s in schedule] == [
        (1, 64, 4, 1), (1, 32, 8, 1), (1, 16, 16, 1), (1, 8, 16, 2), (1, 4, 16, 4),
    ]  # fmt: skip


def test_rule_of_lengths() -> None:
    start = StartModel(MODEL, seq_len=256)
    assert [s.seq_len for s in stages(start, to=4096)] == [512, 1024, 2048, 4096]
    assert [s.seq_len for s in stages(start, to=4096, factor=4)] == [1024, 4096]
    assert [s.seq_len for s in stages(start, to=4096, factor=8)] == [2048, 4096]
    assert [s.seq_len for s in stages(start, to=1024, **{"from": 512})] == [1024], "from stands above the model's own"
    assert [s.seq_len for s in stages(start, to=300, batch_tokens=300)] == [300]


@given(first=st.integers(1, 4096), last=st.integers(2, 1 << 20), factor=st.integers(2, 9))
def test_rule_grows_by_the_factor_and_ends_at_the_target(first: int, last: int, factor: int) -> None:
    if last <= first:
        return
    options = ProgressiveOptions.model_validate({**BASIC, "to": last, "factor": factor, "batch_tokens": last})
    try:
        schedule = progressive(options, StartModel(MODEL, seq_len=first))
    except ConfigError as error:  # a middle length need not divide the batch; anything else is wrong
        assert "is not a multiple of seq_len" in str(error)
        return
    lengths = [first, *(s.seq_len for s in schedule)]
    assert lengths[-1] == last
    assert all(b == a * factor for a, b in pairwise(lengths[:-1]))
    assert lengths[-2] < last <= lengths[-2] * factor


def test_one_value_for_all_or_one_each() -> None:
    text, images = {"text": 1.0}, {"text": 0.5, "images": 0.5}
    first, second = stages(
        lengths=[1024, 2048],
        names=["short", "long"],
        tokens=[1 << 18, 1 << 19],
        batch_tokens=[1 << 14, 1 << 15],
        lr=[1e-3, 1e-4],
        min_lr=[0.0, 1e-5],
        lr_schedule=["cosine", "constant"],
        warmup_steps=3,
        accumulate=[2, 4],
        mesh=["1,1,1,4", "1,1,1,-1"],
        theta=1e5,
        mix=[text, images],
    )
    shared = {"warmup_steps": 3, "rope": RopeSpec(1e5)}
    assert first == Stage(
        name="short", seq_len=1024, tokens=1 << 18, batch_tokens=1 << 14, lr=1e-3, min_lr=0.0, lr_schedule="cosine",
        accumulate=2, mesh="1,1,1,4", mix=text, **shared,  # type: ignore[arg-type]
    )  # fmt: skip
    assert second == Stage(
        name="long", seq_len=2048, tokens=1 << 19, batch_tokens=1 << 15, lr=1e-4, min_lr=1e-5, accumulate=4,
        mix=images, **shared,  # type: ignore[arg-type]
    )  # fmt: skip


def test_defaults_are_those_of_a_literal_stage() -> None:
    (stage,) = stages(lengths=[1024], theta="keep")
    table = StageTable(seq_len=1024, **BASIC)
    for key in ("accumulate", "lr_schedule", "mesh", "mix", "warmup_steps"):
        assert getattr(stage, key) == getattr(table, key), key
    assert stage.min_lr == pytest.approx(1e-5), "a tenth of lr"
    assert stage.rope == RopeSpec(table.theta)


def test_names_are_unique() -> None:
    lengths = [1000, 1024, 1024, 2**20]
    assert [x.name for x in stages(lengths=lengths, batch_tokens=lengths, theta="keep")] == ["1000", "1K", "1K-2", "1M"]
    assert length_name(1536 * 1024) == "1536K"


# -- RoPE ----------------------------------------------------------------------------------------------------------


def test_theta_by_rule() -> None:
    start = StartModel(MODEL, seq_len=4096, rope=RopeSpec(10_000.0))
    by_default, by_name = (stages(start, lengths=[4096, 16_384], **extra) for extra in ({}, {"theta": "ntk"}))
    assert by_default == by_name
    # s = 4, D = 128: 10000 · 4^(128/126) = 40889.9
    assert [s.rope.theta for s in by_name] == pytest.approx([10_000.0, 40_889.94], rel=1e-6)
    # The lowest frequency is stretched by exactly s, so the new length turns it as far as the old one did.
    assert by_name[1].rope.inverse_frequencies(128)[-1] * 4 == pytest.approx(start.rope.inverse_frequencies(128)[-1])
    bound = stages(start, lengths=[128, 32_768], theta="base-bound")
    assert [s.rope.theta for s in bound] == pytest.approx([10_000.0, 9.5174e5], rel=1e-3), "never below the start's"
    mixed = stages(start, lengths=[4096, 16_384, 32_768], theta=["keep", "ntk", 7e6])
    assert [s.rope.theta for s in mixed] == pytest.approx([10_000.0, 40_889.94, 7e6], rel=1e-6)


def test_ntk_by_stages_equals_ntk_at_once() -> None:
    start = StartModel(MODEL, seq_len=4096, rope=RopeSpec(5e5))
    *_, last = stages(start, to=65_536)
    middle = stages(start, to=16_384)[-1]
    again = stages(StartModel(MODEL, seq_len=16_384, rope=middle.rope), to=65_536)[-1]
    assert again.rope.theta == pytest.approx(last.rope.theta, rel=1e-12)


def test_shorter_than_the_start_never_shrinks_theta() -> None:
    (stage,) = stages(StartModel(MODEL, seq_len=2**20, rope=RopeSpec(5e7)), lengths=[1024])
    assert stage.rope == RopeSpec(5e7)


def test_scaling_of_each_stage_is_measured_from_the_start() -> None:
    start = StartModel(MODEL, seq_len=4096, rope=RopeSpec(5e5))
    schedule = stages(start, lengths=[8192, 32_768], scaling={"name": "yarn"})
    assert [s.rope for s in schedule] == [yarn(5e5, 128, factor=f, original=4096) for f in (2.0, 8.0)]
    schedule = stages(
        start,
        lengths=[8192, 32_768],
        theta=[1e6, "keep"],
        scaling=[{"name": "none"}, {"name": "llama3", "factor": 8, "original": 8192, "high_freq_factor": 5}],
    )
    assert schedule[0].rope == RopeSpec(1e6)
    assert schedule[1].rope == llama3(5e5, 128, factor=8.0, original=8192, high_freq_factor=5.0)
    (stage,) = stages(lengths=[8192], scaling={"name": "linear", "factor": 2})
    assert stage.rope.factors == (0.5,) * 64
    (stage,) = stages(lengths=[8192], scaling={"name": "ntk", "original": 4096})
    assert stage.rope.theta == pytest.approx(10_000 * 2 ** (128 / 126))


def test_scaled_start_is_kept_or_replaced_but_never_dropped_silently() -> None:
    scaled = llama3(5e5, 128, factor=8.0, original=8192)
    start = StartModel(MODEL, seq_len=2**17, rope=scaled)
    assert stages(start, to=2**18, theta="keep", batch_tokens=2**18)[0].rope == scaled
    assert stages(start, to=2**18, theta=5e7, scaling={"name": "none"}, batch_tokens=2**18)[0].rope == RopeSpec(5e7)
    for theta in (5e7, "ntk", "base-bound", None):
        with pytest.raises(ConfigError, match="scaled already"):
            stages(start, to=2**18, theta=theta, batch_tokens=2**18)


def test_options_read_back_from_json() -> None:
    """A run is resumed from the options written out."""
    options = ProgressiveOptions.model_validate(
        {**BASIC, "from": 512, "to": 2048, "theta": [1e6, "keep"], "mix": {"a": 1.0},
         "scaling": [{"name": "none"}, {"name": "yarn", "factor": 2}]}
    )  # fmt: skip
    written = options.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert written["from"] == 512
    assert ProgressiveOptions.model_validate(written) == options


# -- wrong use -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", sorted({*PER_STAGE_KEYS, "names"}))
def test_list_of_wrong_length_names_both_counts(key: str) -> None:
    value: dict[str, Any] = {
        "tokens": 1 << 20, "batch_tokens": 1 << 16, "lr": 1e-4, "min_lr": 0.0, "lr_schedule": "cosine",
        "warmup_steps": 1, "accumulate": 1, "mesh": "1,1,1,-1", "mix": {"text": 1.0}, "theta": 1e6,
        "scaling": {"name": "none"}, "names": "same",
    }  # fmt: skip
    for start, lengths in ((None, {"lengths": [512, 1024, 2048]}), (StartModel(MODEL, seq_len=256), {"to": 2048})):
        with pytest.raises((ConfigError, ValidationError), match=rf"{key} has 2 values for 3 stages \(512, 1K, 2K\)"):
            stages(start, **lengths, **{key: [value[key]] * 2})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either lengths"),
        ({"lengths": [512], "to": 1024}, "give either lengths"),
        ({"lengths": [512], "factor": 2}, "factor belongs to the rule"),
        ({"lengths": []}, "at least 1 item"),
        ({"lengths": [1024, 512]}, "512 comes after 1024"),
        ({"to": 1024, "factor": 1}, "greater than or equal to 2"),
        ({"to": 1024, "from": 1024}, "not longer than the 1024 tokens begun from"),
        ({"to": 1024, "form": 1024}, "Extra inputs"),
        ({"lengths": [512, 1024], "names": ["a", "a"]}, "names: a is given to more than one stage"),
        ({"lengths": [512], "theta": "yarn"}, "'keep', 'ntk' or 'base-bound'"),
        ({"lengths": [512], "theta": -1.0}, r"theta: expected a number greater than 0.0, got -1.0 \(stage 1, 512\)"),
        ({"lengths": [512], "scaling": {"name": "yarn", "beta": 1}}, "Extra inputs"),
        ({"lengths": [512], "scaling": {"name": "dynamic"}}, "does not match any of the expected tags"),
        ({"lengths": [0]}, "seq_len: expected a number greater than 0, got 0"),
        ({"lengths": [512], "tokens": 0}, "tokens: expected a number greater than 0, got 0"),
        ({"lengths": [512], "lr_schedule": "linear"}, "'constant' or 'cosine'"),
        ({"lengths": [512], "mesh": "1,1,4"}, "has 3 sizes; expected four"),
        ({"lengths": [512, 1000]}, r"batch_tokens = 65536 is not a multiple of seq_len = 1000.* \(stage 2, 1000\)"),
        ({"lengths": [512], "accumulate": 3}, "accumulate = 3 does not divide the 128 rows"),
    ],
)
def test_wrong_options_are_told_while_reading_them(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ProgressiveOptions.model_validate({**BASIC, **options})


@pytest.mark.parametrize(
    ("start", "options", "message"),
    [
        (StartModel(MODEL), {"to": 1024}, "from: the length that the start model was trained at is not known"),
        (StartModel(MODEL, seq_len=4096), {"to": 1024}, "to = 1024 is not longer than the 4096"),
        (StartModel(MODEL), {"lengths": [1024]}, "theta = 'ntk' measures from"),
        (StartModel(MODEL), {"lengths": [1024], "scaling": {"name": "yarn"}}, "scaling 'yarn' measures from"),
        (
            StartModel(MODEL, seq_len=512),
            {"to": 1024, "theta": "base-bound", "scaling": {"name": "linear"}},
            "theta = 'base-bound' and scaling 'linear' both stretch",
        ),
    ],
)
def test_what_does_not_fit_the_start_model_is_one_line(
    start: StartModel, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        stages(start, **options)
    assert str(caught.value).startswith("context 'progressive': ")
    assert len(str(caught.value).splitlines()) == 1


def test_every_mistake_is_told_at_once_in_the_words_of_a_literal_stage() -> None:
    wrong = {"tokens": [0, 1, 1], "lr": [1.0, -1.0, 1.0], "batch_tokens": [512, 1024, 3000]}
    with pytest.raises(ConfigError) as caught:
        stages(StartModel(MODEL, seq_len=256), to=2048, **wrong)
    literal = []
    for stage, (length, name) in enumerate([(512, "512"), (1024, "1K"), (2048, "2K")]):
        with pytest.raises(ValidationError) as error:
            StageTable(seq_len=length, **{key: values[stage] for key, values in wrong.items()})
        told = problems_from(error.value, StageTable, {})
        literal += [f"context 'progressive': {line} (stage {stage + 1}, {name})" for line in told]
    assert caught.value.problems == literal
    assert len(literal) == 3


def test_mistakes_carry_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        '[context]\nname = "progressive"\nlengths = [512, 1024]\ntokens = 1\nbatch_tokens = 1024\n'
        "lr = 1.0\nwarmup_steps = [1, 2, 3]\n"
    )
    document = read_source(str(file))
    table = {key: value for key, value in document.data["context"].items() if key != "name"}
    with pytest.raises(ValidationError) as caught:
        ProgressiveOptions.model_validate(table)
    (line,) = problems_from(caught.value, ProgressiveOptions, document.origins, ("context",))
    assert line.startswith(f"{file}:7: context.warmup_steps: warmup_steps has 3 values for 2 stages")


def test_the_spec_imports_nothing_heavy() -> None:
    program = (
        "import sys; from lwm_context._lwm import progressive; assert progressive.name == 'progressive';"
        "assert not {'pydantic', 'numpy'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
