"""Make the clips that the recipe tiny-base-vision trains on: python contrib/lwm-tiny-base/clips.py OUT.

Short clips of 64 x 64 pixels, cut at random out of the clip that lwm-vqgan ships: still or drifting, mirrored or not,
some with their colours swapped, at the clip's own pace or frozen. OUT/videos has them, OUT/codes what `lwm encode`
makes of them. The last frames of the clip are left out, for they are held out in the recipe quickstart.

Shapes: T frames [T,S,S,3] uint8.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lwm_core.cli import main as main_of_lwm
from lwm_core.errors import LwmError
from lwm_core.packaged import locate

SOURCE = "lwm-vqgan:clips/bigbuckbunny.mp4"
TRAINED, CLIPS, FRAMES, SIDE, SEED = 112, 400, 12, 64, 0
CUT = (160, 700)
"""Pixels of a cut's side."""
DRIFT = 1.5
"""Pixels of the small frame that a cut moves by in each direction, a frame, at most."""


def main() -> int:
    """Write the clips and have them encoded; the encoder's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    parser.add_argument("--clips", type=int, default=CLIPS, help=f"how many ({CLIPS})")
    options = parser.parse_args()
    videos: Path = options.out / "videos"
    if videos.exists():
        print(f"clips.py: {videos} is there already; remove {options.out}, or name another folder", file=sys.stderr)
        return 1
    try:
        videos.mkdir(parents=True)
        whole, random = read(locate(SOURCE, Path()), TRAINED), np.random.default_rng(SEED)
        for number in range(options.clips):
            write(videos / f"{number:04d}.mkv", cut(whole, random))
    except (LwmError, OSError) as error:
        print(f"clips.py: {error}", file=sys.stderr)
        return 1
    return main_of_lwm(["encode", str(videos), str(options.out / "codes")])


def read(path: Path, count: int) -> list[Image.Image]:
    """The first frames of a video."""
    with av.open(path) as container:
        return [frame.to_image() for frame, _ in zip(container.decode(video=0), range(count), strict=False)]


def cut(whole: Sequence[Image.Image], random: np.random.Generator) -> NDArray[np.uint8]:
    """A clip ``[T,S,S,3]``, drawn at random."""
    width, height = whole[0].size
    side = random.uniform(*CUT)
    corner = random.uniform(0, (width - side, height - side))
    drift = random.uniform(-DRIFT, DRIFT, 2) * (random.random() < 0.6) * side / SIDE
    first, pace = int(random.integers(len(whole) - FRAMES)), int(random.random() < 0.7)
    colours = random.permutation(3) if random.random() < 0.4 else np.arange(3)
    flipped = random.random() < 0.5
    frames = []
    for t in range(FRAMES):
        x, y = np.clip(corner + t * drift, 0, (width - side, height - side))
        box = (float(x), float(y), float(x + side), float(y + side))
        frames.append(np.asarray(whole[first + t * pace].resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)))
    clip = np.stack(frames)[..., colours]
    return np.ascontiguousarray(clip[:, :, ::-1] if flipped else clip)


def write(path: Path, clip: NDArray[np.uint8]) -> None:
    """A video without loss."""
    with av.open(path, "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "bgr0"
        for pixels in clip:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="bgr0")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


if __name__ == "__main__":
    sys.exit(main())
