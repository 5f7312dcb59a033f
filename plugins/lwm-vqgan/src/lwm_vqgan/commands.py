"""``lwm vqgan train | measure | import``."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_vqgan(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``lwm vqgan`` and its verbs."""
    parser = subparsers.add_parser("vqgan", help="train, measure or convert the model that turns frames to codes")
    verbs = parser.add_subparsers(dest="vqgan_verb", metavar="VERB", required=True)
    _add_train(verbs)
    _add_measure(verbs)
    _add_import(verbs)


def _add_train(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "train", help="fit a VQGAN to pictures; the same command goes on where it was stopped",
        description="Fit a VQGAN to pictures, with torch. The model comes to OUT/model; name it in "
        "[encoder] weights. The same command goes on from the last save.",
    )  # fmt: skip
    parser.add_argument("pictures", metavar="PICTURE", type=Path, nargs="+", help="pictures, or folders of them")
    parser.add_argument("--out", metavar="OUT", type=Path, required=True, help="folder of the run")
    parser.add_argument(
        "--like", metavar="FOLDER", default="embedded",
        help="a folder whose config.json gives the shape (default: the model that ships here)",
    )  # fmt: skip
    parser.add_argument(
        "-s", "--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[],
        help="an option of the training (steps=20000) or of the shape (model.code_dim=16)",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, metavar="N", help="processor threads (torch's own choice)")
    parser.set_defaults(run=run_train)


def _add_measure(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "measure", help="PSNR, SSIM and codebook usage on pictures",
        description="Encode and decode random crops of pictures, at several sizes, and compare.",
    )  # fmt: skip
    parser.add_argument("pictures", metavar="PICTURE", type=Path, nargs="+", help="pictures, or folders of them")
    parser.add_argument("--weights", default="embedded", metavar="W", help="as in [encoder] weights (embedded)")
    parser.add_argument("--framework", choices=("auto", "jax", "torch"), default="auto", help="what runs it (auto)")
    parser.add_argument("--crops", type=int, default=1000, metavar="N", help="crops (1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the crops (0)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_measure)


def _add_import(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "import", help="make a folder from diffusers' VQModel or from LWM's file",
        description="Write config.json and model.safetensors from diffusers' VQModel (a folder) or from LWM's pickled "
        "file, of which arrays alone are read: nothing in it can run.",
    )  # fmt: skip
    parser.add_argument("source", metavar="SOURCE", type=Path, help="a folder, or LWM's file")
    parser.add_argument("folder", metavar="DIR", type=Path, help="the folder to write; must not exist")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the arrays")
    parser.set_defaults(run=run_import)


def run_train(args: argparse.Namespace) -> int:
    """Train until the last step, and say where the model is."""
    from lwm_core.errors import PluginError
    from lwm_vqgan.options import installed

    if not installed("torch"):
        raise PluginError("lwm vqgan train: torch is not installed: pip install 'lwm-vqgan[torch]'")
    import torch

    from lwm_vqgan.train.pictures import find_pictures
    from lwm_vqgan.train.run import train
    from lwm_vqgan.train.settings import settings

    config, options = settings(args.like, args.overrides)
    if args.threads is not None:
        torch.set_num_threads(max(1, args.threads))
    args.out.mkdir(parents=True, exist_ok=True)
    model = train(config, options, find_pictures(args.pictures), args.out, note=lambda line: print(line, flush=True))
    print(f'{model}: name it in [encoder] weights = "{model}"')
    return 0


def run_measure(args: argparse.Namespace) -> int:
    """Print what was measured."""
    import json
    import tempfile
    from dataclasses import asdict

    from lwm_core.errors import UsageError
    from lwm_core.protocols import EncoderContext
    from lwm_vqgan.encoder import vqgan
    from lwm_vqgan.measure import measure
    from lwm_vqgan.options import VqganOptions
    from lwm_vqgan.train.pictures import decode_pictures, find_pictures

    if args.crops < 1:
        raise UsageError(f"--crops is {args.crops}; expected at least 1")
    encoder = vqgan(VqganOptions(weights=args.weights, framework=args.framework), EncoderContext())
    with tempfile.TemporaryDirectory() as scratch:
        pictures = decode_pictures(find_pictures(args.pictures), Path(scratch), encoder.frame_size)
        frames = pictures.batch(args.seed, 0, args.crops, jitter=False)
        count = len(pictures.names)
        del pictures  # its file is mapped, and goes with the folder
    found = measure(encoder, frames)
    if args.json:
        print(json.dumps({"pictures": count, **asdict(found)}))
    else:
        print(
            f"{found.frames} crops of {count} pictures: PSNR {found.psnr:.2f} dB (worst {found.worst_psnr:.2f}), SSIM "
            f"{found.ssim:.3f}, {found.codes_used} of {encoder.codes} codes used ({found.usage:.1%}), perplexity "
            f"{found.perplexity:.0f}"
        )
    return 0


def run_import(args: argparse.Namespace) -> int:
    """Write the folder and tell what it holds."""
    from lwm_core.errors import UsageError
    from lwm_vqgan.model.parameters import parameter_count
    from lwm_vqgan.weights.folder import write_folder
    from lwm_vqgan.weights.load import read_weights

    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        raise UsageError(f"{args.folder} exists already; nothing is written over, so name another folder")
    weights = read_weights(args.source)
    write_folder(args.folder, weights, args.dtype)
    shape = f"{weights.config.frame_size}² frames, {weights.config.codes_per_frame} codes of {weights.config.codes}"
    print(f"{args.folder}: {parameter_count(weights.config):,} parameters, {args.dtype}; {shape}")
    return 0
