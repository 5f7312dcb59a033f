"""``lwm generate DIR image|video``: a picture or a video by a run's model, whose codes the run's encoder decodes.

Shapes: T frames of n codes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lwm_core.cli.overrides import add_overrides
from lwm_core.cli.sampling import check_options

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lwm_core.protocols import Media, SamplingSpec, VisionEncoder
    from lwm_core.run import Model, Reopened

FPS = 4.0
"""Frames a second of LWM's videos."""

SHOWN_EVERY = 0.1  # seconds between two changes of the line that tells how far it is

DETAILS = """
Each frame is drawn from the codes alone. With a scale other than 1 the model is asked with the prompt and without it;
what the prompt changes is then taken so many times (classifier-free guidance). 1 takes the prompt's answer as it is.
"""


def add_frames(modalities: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``image`` and ``video``."""
    image = modalities.add_parser("image", help="a picture", description="Write a picture of a text.", epilog=DETAILS)
    image.add_argument("--out", required=True, type=Path, metavar="FILE", help="the .png to write")
    _add_drawing(image, "")
    video = modalities.add_parser("video", help="a video", description="Write a video of a text.", epilog=DETAILS)
    video.add_argument("--out", required=True, type=Path, metavar="OUT", help="the .mp4 or .gif to write, or a folder "
                       "(a name without a suffix), for a .png a frame")  # fmt: skip
    video.add_argument("--frames", type=int, default=8, metavar="N", help="frames (8)")
    video.add_argument("--fps", type=float, default=FPS, metavar="N", help="frames a second (4)")
    _add_drawing(video, " of the first frame")
    video.add_argument("--later-scale", type=float, default=1.0, metavar="S", help="scale of the others (1)")
    video.add_argument("--later-top-k", type=int, default=1000, metavar="K", help="top-k of the others (1000)")
    video.add_argument(
        "--later-temperature", type=float, default=1.0, metavar="T", help="temperature of the others (1)"
    )


def _add_drawing(parser: argparse.ArgumentParser, of: str) -> None:
    """What a picture and the first frame of a video share."""
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what is to be seen; - reads standard input")
    parser.add_argument("--scale", type=float, default=5.0, metavar="S", help=f"guidance{of} (5)")
    parser.add_argument("--top-k", type=int, default=8192, metavar="K", help=f"draw from the K likeliest codes{of}; 0 "
                        "from all (8192)")  # fmt: skip
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help=f"temperature{of}; 0 is greedy (1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the draw (0)")
    add_overrides(parser)
    parser.add_argument("--json", action="store_true", help="print {prompt, out, frames, tokens, read, read_seconds, "
                        "seconds, frames_per_second, source}")  # fmt: skip
    parser.set_defaults(run=run_frames)


def run_frames(args: argparse.Namespace) -> int:
    """Load the model and write. Of several processes, rank 0 decodes and prints, and the others answer along."""
    from lwm_core.cli.pictures import make_media
    from lwm_core.run import lead, reopen

    _check(args)
    media = make_media(args)
    _check_out(args, media)
    opened = reopen(args.folder, args.overrides)
    lead(opened.trainer, lambda model: _write(args, opened, model, media))
    return 0


def _check(args: argparse.Namespace) -> None:
    rows = [
        ("prompt", bool(args.prompt), "a text"),
        ("scale", abs(args.scale) < float("inf"), "a number"),
        ("top-k", args.top_k >= 0, "0 or more"),
        ("temperature", args.temperature >= 0, "0 or more"),
    ]
    if args.modality == "video":
        rows += [
            ("frames", args.frames > 0, "at least 1"),
            ("fps", 0 < args.fps < float("inf"), "a number above 0"),
            ("later-scale", abs(args.later_scale) < float("inf"), "a number"),
            ("later-top-k", args.later_top_k >= 0, "0 or more"),
            ("later-temperature", args.later_temperature >= 0, "0 or more"),
        ]
    check_options(args, rows)


def _check_out(args: argparse.Namespace, media: Media) -> None:
    """Before anything is loaded, for writing comes last."""
    from lwm_core.errors import UsageError

    out: Path = args.out
    suffixes, suffix = media.stills if args.modality == "image" else media.videos, out.suffix.lower()
    if args.modality == "video" and not suffix:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"--out is {out}, which exists; nothing is written over, so name another folder")
    elif suffix not in suffixes:
        folder = "" if args.modality == "image" else ", or that of a folder"
        raise UsageError(f"--out is {out}; expected a name that ends with {' or '.join(suffixes)}{folder}")
    elif out.is_dir():
        raise UsageError(f"--out is {out}, which is a folder; expected the name of a file")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        what = "nothing can be written there" if above.is_dir() else "it is a file"
        raise UsageError(f"--out is {out}, below {above}, but {what}; name another place")


def _samplings(args: argparse.Namespace) -> list[tuple[int, SamplingSpec]]:
    """How many frames are drawn how."""
    from dataclasses import replace

    from lwm_core.run.vision import FIRST, LATER

    first = replace(FIRST, guidance=args.scale, top_k=args.top_k, temperature=args.temperature, seed=args.seed)
    if args.modality == "image" or args.frames == 1:
        return [(1, first)]
    later = replace(
        LATER, guidance=args.later_scale, top_k=args.later_top_k, temperature=args.later_temperature, seed=args.seed
    )
    return [(1, first), (args.frames - 1, later)]


def _write(args: argparse.Namespace, opened: Reopened, model: Model, media: Media) -> None:
    import json

    from lwm_core.cli.pictures import make_encoder
    from lwm_core.run.vision import ClipWriter, needs_guidance, vision_prompt

    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    encoder, pipeline = make_encoder(opened), opened.pipeline
    writer = ClipWriter(model.generator(), pipeline.model.vocabulary, encoder.codes_per_frame, encoder.codes)
    samplings = _samplings(args)
    frames = sum(count for count, _ in samplings)
    prompt, began = vision_prompt(args.modality, text, pipeline.tokenizer), time.perf_counter()
    writer.begin(prompt, guided=needs_guidance(*[one for _, one in samplings]), frames=frames)
    read_seconds = time.perf_counter() - began
    shown = _Shown(frames, encoder.codes_per_frame)
    for count, sampling in samplings:
        if not needs_guidance(sampling):
            writer.unguide()
        for _ in writer.write(count, sampling, shown.note):
            pass
    seconds = shown.close()
    codes = writer.codes
    writer.close()
    _save(args, codes, encoder, media)
    tokens = frames * (encoder.codes_per_frame + 1)
    if args.json:
        facts = {
            "prompt": text, "out": str(args.out), "frames": frames, "tokens": tokens, "read": len(prompt.conditional),
            "read_seconds": read_seconds, "seconds": seconds, "frames_per_second": frames / seconds,
        }  # fmt: skip
        print(json.dumps({**facts, "source": str(opened.source)}))
        return
    print(
        f"{args.out}: {frames} frame{'' if frames == 1 else 's'} · {tokens:,} tokens in {seconds:.1f} s · "
        f"{frames / seconds:.2f} frames/s"
    )


def _save(args: argparse.Namespace, codes: NDArray[np.int32], encoder: VisionEncoder, media: Media) -> None:
    from lwm_core.cli.pictures import decoded

    fps = args.fps if args.modality == "video" else FPS
    if args.modality == "image" or args.out.suffix:
        media.write(args.out, decoded(codes, encoder), fps)
        return
    for number, frame in enumerate(decoded(codes, encoder)):
        media.write(args.out / f"{number:05}{media.stills[0]}", [frame], fps)


class _Shown:
    """How far it is, on a line of a terminal's standard error."""

    def __init__(self, frames: int, length: int) -> None:
        self._frames, self._length = frames, length
        self._shows, self._began, self._done, self._last = sys.stderr.isatty(), time.perf_counter(), 0, 0.0

    def note(self) -> None:
        """One more code is written."""
        from lwm_core.progress import clock

        self._done += 1
        now = time.perf_counter()
        if not self._shows or now - self._last < SHOWN_EVERY:
            return
        self._last = now
        rate = self._done / self._length / max(now - self._began, 1e-9)
        left = clock((self._frames - self._done / self._length) / rate)
        frame = min((self._done - 1) // self._length + 1, self._frames)
        line = f"\r\033[Kframe {frame} of {self._frames} · {rate:.2f} frames/s · {left} left"
        print(line, end="", file=sys.stderr, flush=True)

    def close(self) -> float:
        """Clear the line; the seconds that it took."""
        if self._shows:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        return max(time.perf_counter() - self._began, 1e-9)
