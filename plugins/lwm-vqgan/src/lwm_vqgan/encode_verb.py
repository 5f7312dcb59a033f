"""``lwm encode SOURCE OUT``: pictures and video to shards of codes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lwm_core.cli.overrides import add_overrides

if TYPE_CHECKING:
    from lwm_core.protocols import VisionEncoder
    from lwm_core.shards.layout import Settings
    from lwm_vqgan.progress import EncodeProgress
    from lwm_vqgan.shards.writer import ShardWriter

DEFAULT_ENCODER = "vqgan"


def add_encode(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``lwm encode``."""
    parser = subparsers.add_parser(
        "encode", help="turn pictures and video into codes",
        description="Encode a video, a picture, or a folder of them, into a folder of codes. Stopped or killed, the "
        "same command goes on where it was.",
    )  # fmt: skip
    parser.add_argument("source", metavar="SOURCE", type=Path, help="a video, a picture, or a folder of them")
    parser.add_argument("folder", metavar="OUT", type=Path, help="the folder of codes; new, or begun by this command")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--fps", type=float, metavar="N", help="N frames a second (every frame)")
    which.add_argument("--frames", type=int, metavar="N", help="at most N frames a video, evenly spaced (every frame)")
    add_encoder_options(parser)
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="frames that are encoded together (16)")
    parser.add_argument("--shard-frames", type=int, default=4096, metavar="N", help="frames a shard (4096)")
    parser.add_argument("--skip-broken", action="store_true", help="note broken files, keep what they gave, and go on")
    parser.add_argument("--quiet", action="store_true", help="show warnings and the result only")
    parser.add_argument(
        "--json", action="store_true",
        help="print {folder, videos, frames, tokens_per_frame, tokens, shards, broken, encoded, frames_per_second}",
    )  # fmt: skip
    parser.set_defaults(run=run_encode)


def add_encoder_options(parser: argparse.ArgumentParser, default: str | None = DEFAULT_ENCODER) -> None:
    """``--encoder NAME`` and ``-s KEY=VALUE``."""
    told = default or f"the one that wrote the codes, else {DEFAULT_ENCODER}"
    parser.add_argument("--encoder", metavar="NAME", default=default, help=f"encoder plugin ({told})")
    add_overrides(parser, "an option of the encoder")


def make_encoder(
    name: str, overrides: list[str], options: dict[str, Any] | None = None
) -> tuple[VisionEncoder, str, dict[str, Any]]:
    """The encoder, its ``dist:name`` and its options as JSON has them.

    Raises:
        PluginError: there is no such encoder, or it lacks what an encoder has.
        ConfigError: an option is wrong.
    """
    from lwm_core.errors import PluginError
    from lwm_core.pipeline import make, plug
    from lwm_core.protocols import VisionEncoder

    plugged = plug("encoder", name, overrides, options)
    encoder = make(plugged)
    if not isinstance(encoder, VisionEncoder):
        raise PluginError(f"encoder {plugged.label!r} gives a {type(encoder).__name__}, which is no VisionEncoder")
    return encoder, plugged.label, plugged.options.model_dump(mode="json")


def run_encode(args: argparse.Namespace) -> int:
    """Encode what is not encoded yet, and tell what there is."""
    from lwm_core.run import RunFolder, StoppedError
    from lwm_core.run.stopping import signals_heard
    from lwm_vqgan.media.files import find_sources
    from lwm_vqgan.progress import make_progress
    from lwm_vqgan.shards.encode import EncodeJob, encode_sources

    _check(args)
    sources = find_sources(args.source)
    encoder, settings = _settings(args)
    folder = RunFolder(args.folder)
    progress = make_progress(quiet=args.quiet)
    try:
        with folder.locked(), signals_heard(progress.note) as stop:
            job = EncodeJob(sources, args.folder, encoder, settings, args.skip_broken)
            writer = encode_sources(job, progress, stop.check)
    except StoppedError as stopped:
        raise StoppedError(stopped.signal_number, "stopped; the same command goes on from here") from None
    finally:
        progress.close()
    _tell(args, writer, progress)
    return 1 if any(video.broken for video in writer.videos) else 0


def _check(args: argparse.Namespace) -> None:
    from lwm_core.errors import UsageError
    from lwm_vqgan.media.sampling import Sampling

    Sampling(args.frames, args.fps)
    for name in ("batch", "shard_frames"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected at least 1")
    if args.shard_frames % args.batch:
        raise UsageError(f"--shard-frames is {args.shard_frames}; expected a multiple of --batch {args.batch}")
    if args.folder.exists() and not args.folder.is_dir():
        raise UsageError(f"{args.folder}: is a file; name a folder for the codes")


def _settings(args: argparse.Namespace) -> tuple[VisionEncoder, Settings]:
    from lwm_core.shards.layout import Settings

    encoder, label, options = make_encoder(args.encoder, args.overrides)
    settings = Settings(
        encoder=label, checksum=encoder.checksum, options=options, codes=encoder.codes, frame_size=encoder.frame_size,
        frames=args.frames, fps=args.fps, batch=args.batch, shard_frames=args.shard_frames,
    )  # fmt: skip
    return encoder, settings


def _tell(args: argparse.Namespace, writer: ShardWriter, progress: EncodeProgress) -> None:
    import json

    manifest = writer.manifest
    tokens = manifest.frames * manifest.tokens_per_frame
    broken = [
        {"name": video.name, "frames": video.frames, "broken": video.broken} for video in writer.videos if video.broken
    ]
    if args.json:
        facts = {
            "folder": str(args.folder), "videos": manifest.videos, "frames": manifest.frames,
            "tokens_per_frame": manifest.tokens_per_frame, "tokens": tokens, "shards": len(manifest.shards),
            "broken": broken, "encoded": progress.done, "frames_per_second": progress.rate,
        }  # fmt: skip
        print(json.dumps(facts))
        return
    rate = "" if progress.rate is None else f"; {progress.rate:.1f} frames/s"
    files, frames, shards = (
        f"{count:,} {what}{'' if count == 1 else 's'}"
        for count, what in ((manifest.videos, "file"), (manifest.frames, "frame"), (len(manifest.shards), "shard"))
    )
    print(f"{args.folder}: {files}, {frames}, {tokens:,} codes in {shards}{rate}")
    if broken:
        print(f"broken: {', '.join(str(one['name']) for one in broken)}")
