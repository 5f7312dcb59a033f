"""Which files are pictures and which are video, and those of a folder in a fixed order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lwm_core.errors import DataError

PICTURES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
VIDEOS = frozenset(
    {".3gp", ".avi", ".flv", ".gif", ".h264", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts",
     ".webm", ".wmv"}
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A picture or a video.

    Args:
        path: where it lies.
        name: what it is called: its path below the folder that was asked for, with ``/``; a file's own name else.
        size: its bytes.
    """

    path: Path
    name: str
    size: int


def is_picture(path: Path) -> bool:
    """Whether ``path`` is named as a still picture is; everything else is opened as a video."""
    return path.suffix.lower() in PICTURES


def find_sources(path: Path) -> list[Source]:
    """The pictures and videos that ``path`` means: a file itself, or what a folder holds at any depth.

    In a folder a file counts by its suffix, hidden files and folders are left out, and names are in the order of their
    code points, so every machine sees the same list.

    Raises:
        DataError: there is nothing at ``path``, or a folder without pictures and videos.
    """
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder")
    if not path.is_dir():
        return [Source(path, path.name, path.stat().st_size)]
    found = []
    for file in path.rglob("*"):
        below = file.relative_to(path)
        hidden = any(part.startswith(".") for part in below.parts)
        if not hidden and file.suffix.lower() in PICTURES | VIDEOS and file.is_file():
            found.append(Source(file, below.as_posix(), file.stat().st_size))
    if not found:
        raise DataError(f"{path}: holds no pictures or videos; expected files such as .mp4, .webm, .gif, .png or .jpg")
    return sorted(found, key=lambda source: source.name)
