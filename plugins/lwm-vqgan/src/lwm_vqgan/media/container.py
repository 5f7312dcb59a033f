"""A file opened by FFmpeg, and what can go wrong with it in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lwm_core.errors import DataError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

EXPECTED = "expected a video such as .mp4, .webm or .gif, or a picture such as .png or .jpg"


def local(path: Path) -> str:
    """The file's name as FFmpeg is given it: ``a:b.mp4`` is a file, never another protocol."""
    return f"file:{path}"


@contextmanager
def opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The file and its stream of moving pictures, closed in the end. A cover picture of a song is no such stream.

    Raises:
        DataError: it cannot be opened, now or while it is read, or it has no such stream.
    """
    import av
    from av.stream import Disposition

    check_plain(path)
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty; {EXPECTED}")
    try:
        # A file may be a list of other places; only files of this machine are followed.
        container = av.open(local(path), options={"protocol_whitelist": "file"}, metadata_errors="replace")
    except av.error.FFmpegError as error:
        raise DataError(f"{path}: cannot be opened: {told(error)}; {EXPECTED}") from None
    with container:
        streams = [one for one in container.streams.video if not one.disposition & Disposition.attached_pic]
        if not streams:
            only = ", only audio" if container.streams.audio else ""
            raise DataError(f"{path}: holds no pictures{only}; {EXPECTED}")
        stream = streams[0]
        stream.thread_type = "AUTO"
        try:
            yield container, stream
        except av.error.FFmpegError as error:
            raise DataError(f"{path}: cannot be read: {told(error)}; the file is damaged or cut off") from None


def check_plain(path: Path) -> None:
    """Refuse what is no plain file: a pipe would be waited for, and a device has no end.

    Raises:
        DataError: it is none.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is no plain file" if path.exists() else "there is no such file"
        raise DataError(f"{path}: {what}; {EXPECTED}")


def told(error: BaseException) -> str:
    """FFmpeg's own words for an error."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(str(text).split()) or type(error).__name__
