"""One file of TensorBoard events, written record by record with the package's own writer.

The package's ``EventFileWriter`` is not used: it imports TensorFlow where that is installed, and keeps events in a
thread's queue that a killed process would lose.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

_FILE = re.compile(r"events\.out\.tfevents\.(\d+)\..*")


class EventFile:
    """A new file of events in ``folder``, which other files may lie in already.

    Args:
        folder: TensorBoard's directory of one run; made where it is missing.
        first_step: the first step that will be written. Readers drop what older files say of it and later steps.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / _next_name(folder)
        self._records = RecordWriter(self.path.open("xb"))
        self._write(Event(file_version="brain.Event:2"))
        # In the first file as well: readers take the first start for a beginning and drop nothing at it.
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add(
        self, step: int, scalars: Mapping[str, float], texts: Mapping[str, str] | None = None,
        wall_time: float | None = None,
    ) -> None:  # fmt: skip
        """Write the values of one step, and bring them to the operating system.

        Args:
            step: the run's step, from 1.
            scalars: tag → value.
            texts: tag → Markdown.
            wall_time: seconds since 1970; now by default.
        """
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()])
        for tag, text in (texts or {}).items():
            summary.MergeFrom(text_pb(tag, text))
        self._write(Event(step=step, summary=summary), wall_time)
        self._records.flush()

    def close(self) -> None:
        """Close the file."""
        self._records.close()

    def _write(self, event: Event, wall_time: float | None = None) -> None:
        event.wall_time = time.time() if wall_time is None else wall_time
        self._records.write(event.SerializeToString())


def _next_name(folder: Path) -> str:
    """A name that sorts after those in ``folder``: readers take files in the order of their names.

    Names begin with the second they were made in; two starts in one second, or a clock that went back, must not turn
    the order around.
    """
    seconds = [int(match[1]) for path in folder.iterdir() if (match := _FILE.fullmatch(path.name))]
    second = max([int(time.time()), *(s + 1 for s in seconds)])
    return f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}.0"
