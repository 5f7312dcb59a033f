"""Appending to a file that may have a torn end."""

from __future__ import annotations

import os
from pathlib import Path


def append(path: Path, data: bytes, at: int) -> None:
    """Make ``data`` the end of the file, from byte ``at`` on."""
    with path.open("r+b" if path.exists() else "wb") as file:
        file.truncate(at)
        file.seek(at)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
