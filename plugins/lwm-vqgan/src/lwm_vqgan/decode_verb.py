"""``lwm decode CODES OUT``: codes back to an mp4, a gif or a png.

Shapes: T frames of L codes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lwm_vqgan.encode_verb import DEFAULT_ENCODER, add_encoder_options, make_encoder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lwm_core.protocols import VisionEncoder
    from lwm_core.shards.layout import Settings


class Codes(NamedTuple):
    """``[T, L]`` codes with the rate they were taken at and how they were made, as far as that is known."""

    codes: NDArray[np.integer]
    fps: float | None = None
    settings: Settings | None = None


def add_decode(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``lwm decode``."""
    parser = subparsers.add_parser(
        "decode", help="turn codes into a video or a picture",
        description="Decode a video of a folder of codes, or the codes in a file (.npy, or `codes` in a .safetensors; "
        "[frames, codes a frame]).",
    )  # fmt: skip
    parser.add_argument("source", metavar="CODES", type=Path, help="a folder that lwm encode wrote, or a file of codes")
    parser.add_argument("out", metavar="OUT", type=Path, help="the .mp4, .gif or .png to write")
    parser.add_argument("--video", metavar="NAME", help="which video of a folder, by name or by number from 0")
    parser.add_argument("--frame", type=int, metavar="N", help="this frame alone, from 0")
    parser.add_argument("--fps", type=float, metavar="N", help="frames a second (as taken; 4 where that is unknown)")
    add_encoder_options(parser, None)
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="frames that are decoded together (16)")
    parser.add_argument("--json", action="store_true", help="print {out, frames, fps}")
    parser.set_defaults(run=run_decode)


def run_decode(args: argparse.Namespace) -> int:
    """Decode and write; a batch is in memory at a time."""
    import json

    from lwm_core.errors import UsageError
    from lwm_vqgan.media.write import FPS, write_media

    if args.batch < 1:
        raise UsageError(f"--batch is {args.batch}; expected at least 1")
    found = _read(args)
    if args.frame is not None:
        if not 0 <= args.frame < len(found.codes):
            raise UsageError(f"--frame is {args.frame}; expected 0 to {len(found.codes) - 1}")
        found = found._replace(codes=found.codes[args.frame : args.frame + 1])
    if args.out.suffix.lower() == ".png" and len(found.codes) > 1:
        raise UsageError(
            f"{args.out}: a png holds one frame of {len(found.codes)}; name it with --frame, or write a gif"
        )
    fps = args.fps or found.fps or FPS
    encoder = _encoder(args, found)
    written = write_media(args.out, _decoded(encoder, found.codes, args.batch), fps)
    if args.json:
        print(json.dumps({"out": str(args.out), "frames": written, "fps": fps}))
    else:
        print(f"{args.out}: {written} frame{'' if written == 1 else 's'}")
    return 0


def _read(args: argparse.Namespace) -> Codes:
    from lwm_core.errors import DataError, UsageError
    from lwm_core.shards.reader import open_shards

    if not args.source.exists():
        raise DataError(f"{args.source}: there is no such file or folder")
    if not args.source.is_dir():
        if args.video is not None:
            raise UsageError(f"--video: {args.source} is a file of one video; leave it out")
        return Codes(_codes_in(args.source))
    shards = open_shards(args.source)
    if args.video is None and len(shards.videos) != 1:
        raise UsageError(f"{args.source}: holds {len(shards.videos)} videos; name one with --video, by name or number")
    which: int | str = 0 if args.video is None else args.video
    if isinstance(which, str) and which.isdecimal() and which not in {video.name for video in shards.videos}:
        which = int(which)
    video = shards.video(which)
    if not video.frames:
        raise DataError(f"{args.source}: {video.name} has no frames: {video.broken}")
    return Codes(shards.codes(which), video.fps, shards.manifest.settings)


def _codes_in(path: Path) -> NDArray[np.integer]:
    """``[T, L]`` codes of a file; nothing in it is executed.

    Raises:
        DataError: it holds something else.
    """
    from typing import Any

    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from lwm_core.errors import DataError

    codes: NDArray[Any]
    try:
        if path.suffix == ".npy":
            codes = np.load(path, mmap_mode="r", allow_pickle=False)
        elif path.suffix == ".safetensors":
            codes = load_file(path)["codes"]
        else:
            raise DataError(f"{path}: expected a folder of codes, a .npy or a .safetensors")
    except KeyError:
        raise DataError(f"{path}: holds no array 'codes'; expected one [frames, codes a frame]") from None
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if codes.ndim != 2 or codes.dtype.kind not in "iu" or 0 in codes.shape:
        raise DataError(
            f"{path}: holds {codes.dtype} {list(codes.shape)}; expected whole numbers [frames, codes a frame]"
        )
    return codes


def _encoder(args: argparse.Namespace, found: Codes) -> VisionEncoder:
    """The encoder that is asked for, else the one that made the codes; it must be the same one.

    Raises:
        DataError: the codes are of another, or of none.
    """
    import numpy as np

    from lwm_core.errors import DataError

    settings = found.settings
    if settings is not None and args.encoder is None:
        encoder, label, _ = make_encoder(settings.encoder, args.overrides, settings.options)
    else:
        encoder, label, _ = make_encoder(args.encoder or DEFAULT_ENCODER, args.overrides)
    if settings is not None and encoder.checksum != settings.checksum:
        raise DataError(
            f"{args.source}: its codes are of {settings.encoder} {settings.checksum[:12]}, but {label} here is "
            f"{encoder.checksum[:12]}; name the encoder and its weights with --encoder and -s"
        )
    least, most = int(np.min(found.codes)), int(np.max(found.codes))
    if least < 0 or most >= encoder.codes:
        raise DataError(f"{args.source}: has codes from {least} to {most}; {label} has 0 to {encoder.codes - 1}")
    return encoder


def _decoded(encoder: VisionEncoder, codes: NDArray[np.integer], batch: int) -> Iterator[NDArray[np.uint8]]:
    """``[H,W,3]`` frames, one after the other."""
    import numpy as np

    for start in range(0, len(codes), batch):
        yield from encoder.decode(codes[start : start + batch].astype(np.int32))
