"""Killed at any moment, the suite goes on: nothing twice, nothing lost, nothing asked again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lwm_core.protocols import EvalContext
from lwm_evals import NeedleOptions, NeedleSuite
from lwm_evals.files import Journal, write_atomically

OPTIONS = NeedleOptions(samples=5, samples_longest=5, depths=3, lengths=(384, 512), batch_tokens=1100)

MakeContext = Callable[..., EvalContext]


class KilledError(Exception):
    """Stands for kill -9."""


def finished(make_context: MakeContext, folder: Path) -> tuple[bytes, bytes]:
    context = make_context(out=folder / "needle")
    NeedleSuite(OPTIONS).run(context)
    return (folder / "needle.jsonl").read_bytes(), (folder / "needle.json").read_bytes()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 1), st.sampled_from([b"", b"{", b'{"stage": "ba', b"\x00\x00\x00", b"\xff\n", b"null\n"]))
def test_cut_anywhere_it_ends_as_if_undisturbed(
    make_context: MakeContext, tmp_path_factory: pytest.TempPathFactory, share: float, tail: bytes
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    journal, whole = finished(make_context, folder)
    cut = journal[: round(share * len(journal))]
    (folder / "needle.jsonl").write_bytes(cut + tail)
    (folder / "needle.json").unlink()
    context = make_context(out=folder / "needle")
    NeedleSuite(OPTIONS).run(context)
    assert (folder / "needle.json").read_bytes() == whole
    lines = (folder / "needle.jsonl").read_bytes().splitlines()
    assert sorted(lines) == sorted(journal.splitlines())
    missing = 10 - cut.count(b"\n")
    asked = len(context.generator.prompts)  # type: ignore[attr-defined]
    assert missing <= asked <= missing + 2  # at most one filled-up batch a length


def test_killed_between_batches_it_repeats_none(make_context: MakeContext) -> None:
    calls = 0

    def dies(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KilledError

    context = make_context(progress=dies)
    with pytest.raises(KilledError):
        NeedleSuite(OPTIONS).run(context)
    assert not Path(f"{context.out}.json").exists()
    done = Path(f"{context.out}.jsonl").read_text().count("\n")
    assert 0 < done < 10
    again = make_context()
    NeedleSuite(OPTIONS).run(again)
    known = {tuple(prompt) for prompt in context.generator.prompts}  # type: ignore[attr-defined]
    assert not known & {tuple(prompt) for prompt in again.generator.prompts}  # type: ignore[attr-defined]
    assert len(json.loads(Path(f"{context.out}.json").read_text())["rows"]) == 10


def test_a_finished_stage_asks_nothing(make_context: MakeContext) -> None:
    first = NeedleSuite(OPTIONS).run(make_context())
    again = make_context()
    assert NeedleSuite(OPTIONS).run(again) == first
    assert again.generator.prompts == []  # type: ignore[attr-defined]


def test_more_samples_keep_those_that_are_done(make_context: MakeContext) -> None:
    NeedleSuite(OPTIONS).run(make_context())
    more = make_context()
    NeedleSuite(OPTIONS.model_copy(update={"samples": 8, "samples_longest": 8, "batch_tokens": 100_000})).run(more)
    assert len(more.generator.prompts) == 6  # type: ignore[attr-defined]


@pytest.mark.parametrize("change", [{"seed": 8}, {"held_out": lambda: ["Another text. " * 99]}])
def test_answers_to_other_questions_are_put_aside(make_context: MakeContext, change: dict[str, Any]) -> None:
    NeedleSuite(OPTIONS).run(make_context(lambda prompt: ""))
    other = make_context(**change)
    summary = NeedleSuite(OPTIONS).run(other)
    assert [row["accuracy"] for row in summary] == [1.0, 1.0]
    aside = [path for path in other.out.parent.glob("needle.*.jsonl")]
    assert len(aside) == 1 and aside[0].read_text().count("\n") == 10


def test_the_journal_takes_a_sample_once(tmp_path: Path) -> None:
    row = {"stage": "base", "length": 8, "sample": 0, "retrieved": 1}
    journal = Journal(tmp_path / "j.jsonl", "s")
    journal.append([row])
    journal.append([{**row, "retrieved": 0}])
    assert [r["retrieved"] for r in Journal(tmp_path / "j.jsonl", "s").rows.values()] == [1]
    assert (tmp_path / "j.jsonl").read_text().count("\n") == 1


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, b"old")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
