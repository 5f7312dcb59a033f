"""Checkpoints: what counts as one, and what does not."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest

from lwm_core import checkpoint
from lwm_core.checkpoint import (
    MANIFEST,
    STATE,
    RunState,
    checkpoint_folder,
    commit,
    disk_full,
    latest_good,
    prepare,
    prune,
    read_state,
    verify,
)
from lwm_core.errors import CheckpointError


def make(root: Path, step: int) -> Path:
    folder = checkpoint_folder(root / "checkpoints", step)
    trainer = prepare(folder)
    (trainer / "a.bin").write_bytes(bytes(range(256)) * 4)
    (trainer / "deep").mkdir()
    (trainer / "deep" / "b.bin").write_bytes(b"parameters of step %d" % step)
    commit(folder, RunState(step, 0, "s", step, 100 * step))
    return folder


def test_a_committed_checkpoint_is_good_and_reads_back(tmp_path: Path) -> None:
    folder = make(tmp_path, 7)
    assert verify(folder) is None
    assert read_state(folder) == RunState(7, 0, "s", 7, 700)


FILES = ["trainer/a.bin", "trainer/deep/b.bin", STATE]


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_and_every_edit_is_found_by_name(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path, 1)
    path = folder / name
    whole = path.read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 16)):
        path.write_bytes(whole[:position])
        assert name in (verify(folder) or "") and "bytes" in (verify(folder) or "")
        edited = bytearray(whole)
        edited[position] ^= 1
        path.write_bytes(bytes(edited))
        assert f"{name} was changed" in (verify(folder) or "")
    path.write_bytes(whole)
    assert verify(folder) is None
    path.unlink()
    assert verify(folder) == f"{name} is missing"


def test_a_file_that_slipped_in_is_found(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    (folder / "trainer" / "more").write_text("?")
    assert verify(folder) == "trainer/more is not in its manifest"


def test_no_prefix_of_a_manifest_is_good(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    whole = (folder / MANIFEST).read_bytes()
    for length in range(len(whole.rstrip())):
        (folder / MANIFEST).write_bytes(whole[:length])
        assert verify(folder) is not None, length


@pytest.mark.parametrize("text", ["[]", "{}", "null", '{"format": 1, "files": {}}', '{"format": 2, "files": {}}',
                                  '{"format": 1, "files": {"state.json": 3}}'])  # fmt: skip
def test_a_manifest_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    folder = make(tmp_path, 1)
    (folder / MANIFEST).write_text(text)
    assert verify(folder) is not None


def test_the_newest_good_one_is_used_and_the_others_named(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    folders = [make(tmp_path, step) for step in (9, 10, 11, 100)]
    (folders[3] / "trainer" / "a.bin").write_bytes(b"")
    (folders[2] / MANIFEST).unlink()
    found = latest_good(root)
    assert found.path == folders[1]
    assert [(path, "trainer/a.bin" in reason) for path, reason in found.refused] == [(folders[3], True)]
    assert found.unfinished == [folders[2]]


def test_there_may_be_none(tmp_path: Path) -> None:
    assert latest_good(tmp_path / "checkpoints").path is None
    (tmp_path / "checkpoints" / "step_1").mkdir(parents=True)
    (tmp_path / "checkpoints" / "notes").mkdir()
    found = latest_good(tmp_path / "checkpoints")
    assert (found.path, found.refused, len(found.unfinished)) == (None, [], 1)


def test_pruning_keeps_the_newest_and_what_is_being_written(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    shutil.copytree(checkpoint_folder(root, 1), checkpoint_folder(root, 0))
    (checkpoint_folder(root, 0) / MANIFEST).unlink()
    prepare(checkpoint_folder(root, 5))
    assert {path.name for path in prune(root, 2)} == {"step_0", "step_1", "step_2"}
    assert {path.name for path in root.iterdir()} == {"step_3", "step_4", "step_5"}
    assert prune(root, 2) == []


def test_a_second_attempt_starts_from_an_empty_folder(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    assert list(prepare(folder).iterdir()) == []
    assert verify(folder) is not None


def test_a_disk_that_fills_up_while_committing_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = make(tmp_path, 1)
    folder = checkpoint_folder(tmp_path / "checkpoints", 2)
    prepare(folder)
    write = checkpoint._write_synced

    def full(path: Path, text: str) -> None:
        write(path, text[: len(text) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_synced", full)
    with pytest.raises(OSError) as caught:
        commit(folder, RunState(2, 0, "s", 2, 0))
    checkpoint.discard(folder)
    told = checkpoint.save_failed(folder, caught.value)
    assert "the disk is full; step_1 before it is untouched" in str(told) and "\n" not in str(told)
    assert latest_good(tmp_path / "checkpoints").path == before and not folder.exists()


def test_a_full_disk_is_known_through_other_errors_and_in_words() -> None:
    assert disk_full(OSError(errno.ENOSPC, "x")) and disk_full(OSError(errno.EDQUOT, "x"))
    assert disk_full(ValueError("write failed: No space left on device"))
    try:
        try:
            raise OSError(errno.ENOSPC, "x")
        except OSError as error:
            raise RuntimeError("could not write") from error
    except RuntimeError as outer:
        assert disk_full(outer)
    assert not disk_full(OSError(errno.EACCES, "x"))


@pytest.mark.parametrize("text", ["", "{}", "[1]", json.dumps({"format": 9, "step": 1})])
def test_a_state_that_cannot_be_read_is_one_line(tmp_path: Path, text: str) -> None:
    folder = make(tmp_path, 1)
    (folder / STATE).write_text(text)
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        read_state(folder)
    assert "\n" not in str(caught.value)
