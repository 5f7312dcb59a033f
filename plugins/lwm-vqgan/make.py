"""Train the small VQGAN that ships in this package, and measure it: python plugins/lwm-vqgan/make.py DEBS RUN.

DEBS holds Debian packages, each unpacked into a folder of its own name:

    for p in mate-backgrounds lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 gnome-backgrounds ukui-wallpapers \
             palapeli-data plasma-workspace-wallpapers python3-skimage; do
        apt-get download $p && dpkg -x ${p}_*.deb $p
    done

RUN is the folder of the training; the same command goes on where it was stopped. It ends with the model in
src/lwm_vqgan/embedded and with what was measured there, which the card quotes.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from lwm_core.errors import LwmError
from lwm_vqgan.encoder import VqganEncoder
from lwm_vqgan.measure import measure
from lwm_vqgan.model.config import VqganConfig
from lwm_vqgan.train.options import TrainOptions
from lwm_vqgan.train.pictures import decode_pictures, find_pictures
from lwm_vqgan.train.run import train
from lwm_vqgan.weights.folder import EMBEDDED, read_folder, write_folder

CONFIG = VqganConfig(
    frame_size=64, base_channels=16, channel_multipliers=(1, 2, 4), encoder_blocks=1, decoder_blocks=1,
    latent_channels=32, code_dim=8, codes=8192, norm_groups=4,
)  # fmt: skip
OPTIONS = TrainOptions(steps=2000, batch=8, lr=2e-3, decay_share=0.0, codebook_from=400)

FOLDERS = (
    "mate-backgrounds/usr/share/backgrounds/mate",
    "lomiri-wallpapers-16.04/usr",
    "lomiri-wallpapers-20.04/usr",
    "gnome-backgrounds/usr",
    "ukui-wallpapers/usr",
    "palapeli-data/usr/share/palapeli",
)
WALLPAPERS = "plasma-workspace-wallpapers/usr/share/wallpapers"  # a folder a picture, which holds it in many sizes
SAME = "Elephants_"  # further sizes of a picture that is there already
HELD_OUT = (
    "Dragonfly_by_Bolly", "umang_by_Abhishek_Mudgal", "Storm", "LadyBird", "panther-chameleon-female",
    "EveningGlow", "BytheWater",
)  # fmt: skip
OTHERS = "python3-skimage/usr/lib/python3/dist-packages/skimage/data"
HELD_OUT_OTHERS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
"""Held out too, and of a source from which nothing is trained on."""

CROPS, SEED = 1000, 7


def gather(debs: Path) -> tuple[list[Path], list[Path]]:
    """The photographs and paintings to train on, and those held out.

    Raises:
        DataError: a package is not there.
    """
    found = [path for folder in FOLDERS for path in find_pictures([debs / folder]) if SAME not in path.name]
    for folder in sorted((debs / WALLPAPERS).iterdir()):
        sizes = [path for path in (folder / "contents" / "images").glob("*x*") if not path.is_symlink()]
        if sizes:
            found.append(max(sizes, key=lambda path: int(path.name.split("x")[0])).resolve())
    held_out = [path for path in found if any(name in str(path) for name in HELD_OUT)]
    others = find_pictures(debs / OTHERS / name for name in HELD_OUT_OTHERS)
    return [path for path in found if path not in held_out], held_out + others


def video_frames(path: Path) -> NDArray[np.uint8]:
    """Every frame of a video, shortest side 64, centre crop."""
    import av

    side, frames = CONFIG.frame_size, []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            image = frame.to_image()
            scale = side / min(image.size)
            to = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
            whole = np.asarray(image.resize(to, Image.Resampling.BOX))
            top, left = (whole.shape[0] - side) // 2, (whole.shape[1] - side) // 2
            frames.append(whole[top : top + side, left : left + side])
    return np.stack(frames)


def main() -> int:
    """Train, keep in float16, measure; 1 where something is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("debs", type=Path, metavar="DEBS", help="folder of the unpacked packages")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the training")
    parser.add_argument("--video", type=Path, metavar="FILE", help="a video to measure on; none of it is trained on")
    parser.add_argument("--threads", type=int, default=1, help="processor threads (1)")
    parser.add_argument("--out", type=Path, default=EMBEDDED, help="where the model goes (default: the package)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        trained_on, held_out = gather(args.debs)
        args.run.mkdir(parents=True, exist_ok=True)
        model = train(CONFIG, OPTIONS, trained_on, args.run, note=lambda line: print(line, flush=True))
        write_folder(args.out, read_folder(model), "float16")
        encoder = VqganEncoder(read_folder(args.out), "torch", 16)
        pictures = decode_pictures(held_out, args.run / "held_out", CONFIG.frame_size)
        found = {"photographs": measure(encoder, pictures.batch(SEED, 0, CROPS, jitter=False))}
        if args.video is not None:
            found["video"] = measure(encoder, video_frames(args.video))
    except (LwmError, OSError) as error:
        print(f"make.py: {error}", file=sys.stderr)
        return 1
    told = {"trained_on": len(trained_on), "held_out": len(held_out)} | {k: asdict(m) for k, m in found.items()}
    (args.out / "measured.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(told, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
