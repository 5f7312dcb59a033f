"""Pictures and video of a chat: the options and lines that name them, their files, and their ids."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lwm_core.cli.sampling import check_options, say_aside

if TYPE_CHECKING:
    from lwm_core.protocols import Media, MediaClip, VisionEncoder
    from lwm_core.run import Reopened

FRAMES = 8  # of a video, as LWM's vision chat takes
KINDS = ("image", "video")


def add_shown(parser: argparse.ArgumentParser) -> None:
    """``--image``, ``--video``, and how many frames of a video are taken."""
    for kind, what in (("image", "this picture"), ("video", "frames of this video")):
        parser.add_argument(f"--{kind}", dest="shown", action="append", default=[], type=partial(_of_kind, kind),
                            metavar="FILE", help=f"show {what} first; repeatable")  # fmt: skip
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--frames", type=int, metavar="N", help=f"at most N frames a video, evenly spaced ({FRAMES})")
    which.add_argument("--fps", type=float, metavar="N", help="N frames a second of it instead")


def _of_kind(kind: str, text: str) -> tuple[str, Path]:
    return kind, Path(text)


def named(line: str) -> tuple[str, Path] | None:
    """What a line ``/image FILE`` or ``/video FILE`` names; none where it is a question.

    Raises:
        UsageError: it names no file.
    """
    from lwm_core.errors import UsageError

    word, *rest = line.split(None, 1)
    if word not in (f"/{kind}" for kind in KINDS):
        return None
    if not rest:
        raise UsageError(f"{word} names no file; write {word} FILE")
    return word.removeprefix("/"), Path(rest[0].strip()).expanduser()


class Shown:
    """Opens files and makes ids of them. What encodes is made for the first of them, and kept.

    Args:
        args: of the command.

    Raises:
        UsageError: an option is wrong.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        rows = [("frames", args.frames is None or args.frames > 0, "at least 1"),
                ("fps", args.fps is None or 0 < args.fps < float("inf"), "a number above 0")]  # fmt: skip
        check_options(args, rows)
        self._args = args
        self._frames = FRAMES if args.frames is None and args.fps is None else args.frames
        self._media: Media | None = None
        self._encoder: VisionEncoder | None = None

    def open(self, kind: str, path: Path) -> MediaClip:
        """The file, looked through but not decoded yet.

        Raises:
            UsageError: it is the other kind, or the run has no encoder.
            DataError: it cannot be read.
        """
        from lwm_core.cli.pictures import make_media
        from lwm_core.errors import UsageError

        if self._media is None:
            self._media = make_media(self._args)
        video = kind == "video"
        clip = self._media.open(path, **({"frames": self._frames, "fps": self._args.fps} if video else {}))
        if video and clip.still:
            raise UsageError(f"{path}: is a picture; name it with --image, or /image between questions")
        if not video and not clip.still:
            raise UsageError(f"{path}: is a video; name it with --video, or /video between questions")
        return clip

    def ids(self, clips: Sequence[MediaClip], opened: Reopened) -> list[int]:
        """Ids of pictures and videos, one after the other; how long encoding took is told.

        Raises:
            DataError: a file is damaged.
        """
        import time

        from lwm_core.cli.pictures import encoded, make_encoder
        from lwm_core.run.vision import vision_block

        if not clips:
            return []
        self._encoder = encoder = self._encoder or make_encoder(opened)
        pipeline, ids = opened.pipeline, list[int]()
        for clip in clips:
            began = time.perf_counter()
            codes = encoded(clip, encoder)
            seconds = max(time.perf_counter() - began, 1e-9)
            ids += vision_block(codes, pipeline.model.vocabulary, pipeline.tokenizer)
            if not self._args.json:
                frames = f"{len(codes)} frame{'' if len(codes) == 1 else 's'}"
                say_aside(f"{clip.path}: {frames} encoded in {seconds:.1f} s · {len(codes) / seconds:,.1f} frames/s")
        return ids
