"""``lwm import SOURCE DIR`` and ``lwm export RUN DIR``: a model folder from other files, and from a run."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json")


def add_import(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``lwm import``."""
    parser = subparsers.add_parser(
        "import", help="make a model folder of a Hugging Face Llama or of LWM's release",
        description="Write a model folder, to start from with init = \"DIR\": from a Hugging Face Llama "
        "(safetensors, or Torch's bins), or from the parameter stream of LWM's JAX release.",
    )  # fmt: skip
    parser.add_argument("source", metavar="SOURCE", type=Path, help="a folder with config.json, or LWM's stream")
    parser.add_argument("folder", metavar="DIR", type=Path, help="the model folder to write; must not exist")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the arrays (bfloat16)")
    parser.add_argument("--vision-size", type=int, metavar="N", help="add N new rows for vision ids (LWM: 8448)")
    parser.add_argument("--theta", type=float, metavar="T", help="LWM's stream: RoPE's base")
    parser.add_argument("--seq-len", type=int, metavar="N", help="LWM's stream: trained length in tokens")
    parser.add_argument("--heads", type=int, default=32, metavar="H", help="LWM's stream: query heads (32)")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder of the tokenizer's files (SOURCE)")
    parser.set_defaults(run=run_import)


def add_export(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``lwm export``."""
    parser = subparsers.add_parser(
        "export", help="write a run's model as a Hugging Face Llama",
        description="Write a run's final model, or its newest good checkpoint, as a folder that transformers reads.",
    )  # fmt: skip
    parser.add_argument("source", metavar="RUN", type=Path, help="the run's folder")
    parser.add_argument("folder", metavar="DIR", type=Path, help="the model folder to write; must not exist")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the arrays (bfloat16)")
    parser.set_defaults(run=run_export)


def _check_new(folder: Path) -> None:
    """Refuse a folder that holds anything."""
    from lwm_core.errors import UsageError

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists already; nothing is written over, so name another folder")


@contextmanager
def _whole_or_nothing(folder: Path) -> Iterator[None]:
    """Take back what was begun of the new folder, where it cannot be ended.

    Raises:
        CheckpointError: it cannot be written, as on a full disk.
    """
    from lwm_core.errors import CheckpointError

    try:
        yield
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"{folder}: cannot be written: {error.strerror or error}") from None
        raise


def run_import(args: argparse.Namespace) -> int:
    """Write the model folder and tell what it holds."""
    from lwm_core.errors import UsageError
    from lwm_core.weights import write_model_folder
    from lwm_hf.interchange.sources import TABLES, Unsaid, open_source, special_ids, with_vision

    _check_new(args.folder)
    tokenizer = args.tokenizer or (args.source if args.source.is_dir() else None)
    if args.tokenizer is not None and not args.tokenizer.is_dir():
        raise UsageError(f"--tokenizer {args.tokenizer}: there is no such folder")
    source = open_source(args.source, Unsaid(args.theta, args.seq_len, args.heads))
    old = source.model.vocabulary.size
    if args.vision_size is not None:
        source = with_vision(source, args.vision_size, args.dtype)
    model = source.model
    with _whole_or_nothing(args.folder):
        write_model_folder(
            args.folder, model, source.rope, source.seq_len, source.parameters(), args.dtype,
            special_ids=special_ids(args.source, tokenizer),
        )  # fmt: skip
        copied = [name for name in TOKENIZER_FILES if tokenizer is not None and (tokenizer / name).is_file()]
        for name in copied:
            shutil.copyfile(tokenizer / name, args.folder / name)
    size, theta = f"{model.parameter_count:,}", f"{source.rope.theta:g}"
    print(f"{args.folder}: {size} parameters from {source.what}, {args.dtype}, theta {theta}")
    if model.vocabulary.size > old:
        tables = TABLES[: 1 if model.tie_embeddings else 2]
        print(f"new, drawn at random: rows {old} to {model.vocabulary.size - 1} of {' and '.join(tables)}")
    if not copied:
        print("no tokenizer was found; put its tokenizer.json there, or name one with [tokenizer]")
    return 0


def run_export(args: argparse.Namespace) -> int:
    """Write the run's model; of several processes, the first does."""
    from lwm_core.launched import launched_world
    from lwm_core.run import Model, lead, reopen
    from lwm_core.weights import write_model_folder

    if launched_world() == 1:  # of several, the first looks when all can hear of it
        _check_new(args.folder)
    opened = reopen(args.source)
    config, stage = opened.pipeline.model, opened.stage

    def write(model: Model) -> None:
        _check_new(args.folder)
        with _whole_or_nothing(args.folder):
            tokenizer = opened.pipeline.tokenizer
            write_model_folder(
                args.folder, config, stage.rope, stage.seq_len, model.iter_parameters(), args.dtype,
                special_ids=tokenizer.special_ids,
            )  # fmt: skip
            tokenizer.save(args.folder)
        print(f"{args.folder}: {config.parameter_count:,} parameters of {opened.source}, {args.dtype}")

    lead(opened.trainer, write)
    return 0
