"""Checkpoints on disk: a folder a step, its manifest written last. Without a good manifest it does not exist.

checkpoints/step_N/trainer/       the trainer's own files
checkpoints/step_N/state.json     where the run stands
checkpoints/step_N/manifest.json  size and SHA-256 of every other file
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lwm_core.durable import sync_folder
from lwm_core.errors import CheckpointError

MANIFEST = "manifest.json"
STATE = "state.json"
TRAINER = "trainer"
FORMAT = 1

_STEP = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class RunState:
    """Where a run stands after a step.

    Args:
        step: steps done in the whole run.
        stage_index: position of the stage in the schedule.
        stage: its name.
        stage_step: steps done in the stage; also the feed's position, for the feed is a function of the step.
        metrics_bytes: length of ``metrics.jsonl`` after this step.
    """

    step: int
    stage_index: int
    stage: str
    stage_step: int
    metrics_bytes: int


@dataclass(frozen=True)
class Found:
    """What :func:`latest_good` found: the newest good checkpoint, and why each newer one is refused.

    ``unfinished`` are folders without a manifest: saves that were cut off, which never were checkpoints.
    """

    path: Path | None
    refused: list[tuple[Path, str]]
    unfinished: list[Path]


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    """The folder of the checkpoint after ``step`` steps."""
    return checkpoints / f"step_{step}"


def prepare(folder: Path) -> Path:
    """Make ``folder`` anew, without whatever an earlier attempt left there; returns the trainer's empty folder."""
    if folder.exists():
        shutil.rmtree(folder)
    (folder / TRAINER).mkdir(parents=True)
    return folder / TRAINER


def commit(folder: Path, state: RunState) -> None:
    """Write state and manifest of a folder that the trainer has finished with; only then is it a checkpoint.

    Every file reaches the disk before the manifest takes its name, so a power cut leaves no half checkpoint.

    Raises:
        OSError: the disk is full or fails; there is no manifest then.
    """
    _write_synced(folder / STATE, json.dumps({"format": FORMAT, **asdict(state)}, indent=2) + "\n")
    files = {name: _digest(folder / name, sync=True) for name in _file_names(folder)}
    for inner in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync_folder(inner)
    partial = folder / f"{MANIFEST}.partial"
    _write_synced(partial, json.dumps({"format": FORMAT, "step": state.step, "files": files}, indent=1) + "\n")
    partial.replace(folder / MANIFEST)
    sync_folder(folder)
    sync_folder(folder.parent)


def verify(folder: Path) -> str | None:
    """What is wrong with the checkpoint in ``folder``, or None: every file is there with its size and checksum."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        listed: dict[str, dict[str, Any]] = manifest["files"]
        known = manifest["format"]
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in listed.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}: saving was cut off"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    if known != FORMAT:
        return f"{MANIFEST} has format {known!r}; this version reads {FORMAT}"
    present = set(_file_names(folder))
    for name, (size, checksum) in expected.items():
        if name not in present:
            return f"{name} is missing"
        actual = (folder / name).stat().st_size
        if actual != size:
            return f"{name} has {actual} bytes; its manifest says {size}"
        if _digest(folder / name)["sha256"] != checksum:
            return f"{name} was changed: its SHA-256 is not its manifest's"
    strangers = sorted(present - set(expected))
    if strangers:
        return f"{strangers[0]} is not in its manifest"
    if STATE not in expected:
        return f"{STATE} is not in its manifest"
    return None


def read_state(folder: Path) -> RunState:
    """The state in a checkpoint.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        values = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}")
        return RunState(**values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / STATE}: cannot be read: {error}") from None


def step_folders(checkpoints: Path) -> list[Path]:
    """The folders of checkpoints, good or not, newest first."""
    if not checkpoints.is_dir():
        return []
    steps = [(int(m[1]), path) for path in checkpoints.iterdir() if (m := _STEP.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(steps, reverse=True)]


def latest_good(checkpoints: Path) -> Found:
    """The newest checkpoint that :func:`verify` accepts, and what was passed over on the way to it."""
    refused: list[tuple[Path, str]] = []
    unfinished: list[Path] = []
    for folder in step_folders(checkpoints):
        if not (folder / MANIFEST).exists():
            unfinished.append(folder)
            continue
        problem = verify(folder)
        if problem is None:
            return Found(folder, refused, unfinished)
        refused.append((folder, problem))
    return Found(None, refused, unfinished)


def prune(checkpoints: Path, keep: int) -> list[Path]:
    """Remove all but the newest ``keep`` that have a manifest, and unfinished ones older than those; returns them."""
    complete = [folder for folder in step_folders(checkpoints) if (folder / MANIFEST).exists()]
    if len(complete) < keep:
        return []
    oldest = complete[keep - 1]
    folders = step_folders(checkpoints)
    gone = folders[folders.index(oldest) + 1 :]
    for folder in gone:
        # Without its manifest it is no checkpoint any more, whatever a crash leaves of it.
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
    return gone


def discard(folder: Path) -> None:
    """Remove what was written of a save that failed, as far as that is possible."""
    shutil.rmtree(folder, ignore_errors=True)


def save_failed(folder: Path, error: BaseException) -> CheckpointError:
    """The one line for a save that failed, a full disk said as such."""
    before = next((path.name for path in step_folders(folder.parent) if (path / MANIFEST).exists()), None)
    kept = f"{before} before it is untouched" if before else "there is none before it"
    if disk_full(error):
        return CheckpointError(
            f"checkpoint {folder}: the disk is full; {kept}; free space, then lwm resume {folder.parent.parent}",
            details=repr(error),
        )
    reason = " ".join(str(error).split()) or type(error).__name__
    return CheckpointError(f"checkpoint {folder}: cannot be written: {reason}; {kept}", details=repr(error))


def disk_full(error: BaseException | None) -> bool:
    """Whether ``error``, or what it came from, says that the disk is full; C++ writers say so in words only."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _file_names(folder: Path) -> list[str]:
    """Every file below ``folder`` but the manifest, with ``/`` on every system."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    names = sorted(path.relative_to(folder).as_posix() for path in paths)
    return [name for name in names if name not in (MANIFEST, f"{MANIFEST}.partial")]


def _digest(path: Path, *, sync: bool = False) -> dict[str, Any]:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": file.tell(), "sha256": checksum}


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
