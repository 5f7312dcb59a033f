"""A run's folder: who may write to it, and ``run.json``, which says what the run is."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lwm_core.config.document import Document, Origin, walk
from lwm_core.config.envelope import RunConfig
from lwm_core.config.load import LoadedConfig
from lwm_core.durable import write_whole
from lwm_core.errors import UsageError
from lwm_core.protocols import Stage
from lwm_core.rope import RopeScaling, RopeSpec

RUN_FILE = "run.json"
LOCK_FILE = ".lock"

DONE, RUNNING, STOPPED, FAILED = "done", "running", "stopped", "failed"


@dataclass(frozen=True)
class Run:
    """A run as hooks see it.

    Args:
        folder: where it lies.
        name: what it is called.
        config: its configuration.
        stages: its schedule.
    """

    folder: Path
    name: str
    config: RunConfig
    stages: tuple[Stage, ...]


class RunFolder:
    """The places inside a run's folder, and its ``run.json``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.evals = path / "evals"
        self.samples = path / "samples"
        self.model = path / "model"

    def read(self) -> dict[str, Any]:
        """``run.json``.

        Raises:
            UsageError: the folder is not a run, or its ``run.json`` is damaged.
        """
        path = self.path / RUN_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            what = "there is no run.json in it" if self.path.is_dir() else "no such folder"
            raise UsageError(f"{self.path} is not a run: {what}; start one with lwm run") from None
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: cannot be read: {error}") from None
        if not isinstance(values, dict) or "config" not in values:
            raise UsageError(f"{path}: expected a run's description with its config")
        return values

    def write(self, values: Mapping[str, Any]) -> None:
        """Replace ``run.json`` at once."""
        write_whole(self.path / RUN_FILE, (json.dumps(values, indent=2, default=str) + "\n").encode())

    def update(self, **values: Any) -> None:
        """Change single values of ``run.json``."""
        self.write({**self.read(), **values})

    def refuse_if_used(self) -> None:
        """Raise :class:`UsageError` unless the folder is new or empty."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UsageError(f"{self.path} is a file; choose another folder with --out")
        if any(entry.name != LOCK_FILE for entry in self.path.iterdir()):
            more = f"continue it with lwm resume {self.path}, or " if (self.path / RUN_FILE).exists() else ""
            raise UsageError(f"{self.path} exists and is not empty: {more}choose another folder with --out")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process from running in this folder; the lock ends with the process, however it ends.

        Raises:
            UsageError: another process has it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / LOCK_FILE).open("a") as file:
            if not _lock(file):
                raise UsageError(f"{self.path} is in use: another lwm process is running it; wait for it or stop it")
            yield


def open_run(path: Path, overrides: Sequence[str] = ()) -> tuple[RunFolder, LoadedConfig, dict[str, Any]]:
    """A run's folder, its configuration as it was resolved when it started, and its ``run.json``.

    Args:
        path: the folder.
        overrides: ``KEY=VALUE`` texts, laid on the configuration.

    Raises:
        UsageError: the folder is not a run.
        ConfigError: its configuration, with the overrides, is not one that this version accepts.
    """
    from pydantic import ValidationError

    from lwm_core.config.load import plugin_tables
    from lwm_core.config.override import apply_overrides
    from lwm_core.config.problems import problems_from
    from lwm_core.errors import ConfigError

    folder = RunFolder(path)
    values = folder.read()
    source = str(path / RUN_FILE)
    given = Document(source, values["config"], {key: Origin(source) for key, _ in walk(values["config"])})
    document, problems = apply_overrides(given, overrides, plugin_tables(RunConfig))
    try:
        config = RunConfig.model_validate(document.data)
    except ValidationError as error:
        problems += problems_from(error, RunConfig, document.origins)
    if problems:
        raise ConfigError(problems)
    return folder, LoadedConfig(config, document.data, document.origins, document.notes, source), values


def stages_from(values: Mapping[str, Any]) -> tuple[Stage, ...]:
    """The schedule in a ``run.json``."""
    return tuple(Stage(**{**stage, "rope": rope_from(stage["rope"])}) for stage in values["stages"])


def rope_from(values: Mapping[str, Any]) -> RopeSpec:
    """A RoPE as JSON has it."""
    factors, scaling = values["factors"], values.get("scaling")
    return RopeSpec(
        **{**values, "factors": None if factors is None else tuple(factors),
           "scaling": None if scaling is None else RopeScaling(**scaling)}
    )  # fmt: skip


if sys.platform == "win32":  # pragma: no cover

    def _lock(file: IO[str]) -> bool:
        import msvcrt

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:

    def _lock(file: IO[str]) -> bool:
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
