"""A training run on disk: begun, continued from its last save, and ended with a folder of the model.

``run.json`` says what is trained and how, ``state.safetensors`` is the last save, ``log.jsonl`` has a line for each
line that was printed, ``pictures/`` are the decoded pictures and ``model/`` is the model as of the last save.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lwm_core.errors import CheckpointError, UsageError
from lwm_core.progress import clock
from lwm_vqgan.model.config import VqganConfig
from lwm_vqgan.train.options import TrainOptions
from lwm_vqgan.train.pictures import Pictures, decode_pictures
from lwm_vqgan.train.trainer import VqganTrainer
from lwm_vqgan.weights.folder import VqganWeights, write_folder

RUN_FILE, STATE_FILE, LOG_FILE = "run.json", "state.safetensors", "log.jsonl"
PICTURES, MODEL = "pictures", "model"


def train(
    config: VqganConfig,
    options: TrainOptions,
    files: Sequence[Path],
    out: Path,
    *,
    note: Callable[[str], None] = print,
) -> Path:
    """Train on the pictures in ``files`` until ``options.steps``, from the last save in ``out`` where there is one.

    Args:
        note: told a line every ``log_every`` steps.

    Returns:
        The folder of the model.

    Raises:
        UsageError: ``out`` holds a run of another model, of other options (but ``steps``) or of other pictures.
        DataError: no picture can be used.
        CheckpointError: the saved state is damaged.
        TrainingError: the loss is not finite.
    """
    pictures = _begin(config, options, files, out, note)
    trainer = VqganTrainer(config, options, pictures)
    if (out / STATE_FILE).exists():
        trainer.restore(_load(out / STATE_FILE))
        note(f"goes on after step {trainer.step}")
    lines = _Lines(trainer, out / LOG_FILE, note)
    while trainer.step < options.steps:
        lines.step(trainer.advance())
        if trainer.step % options.save_every == 0 or trainer.step == options.steps:
            _save(trainer, out)
    if not (out / MODEL).exists():  # continued with fewer steps than are done
        _save(trainer, out)
    return out / MODEL


def _begin(
    config: VqganConfig, options: TrainOptions, files: Sequence[Path], out: Path, note: Callable[[str], None]
) -> Pictures:
    """Decode the pictures of a new run, or find those of the one that is continued."""
    facts = {
        "config": config.model_dump(mode="json"),
        "options": options.model_dump(mode="json"),
        "pictures": [str(path) for path in files],
    }
    if (out / RUN_FILE).exists():
        _check_same(out / RUN_FILE, facts)
        pictures = Pictures(out / PICTURES)
    else:
        note(f"decoding {len(files)} pictures")
        pictures = decode_pictures(files, out / PICTURES, config.frame_size, note=note)
    (out / RUN_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return pictures


def _check_same(path: Path, facts: dict[str, Any]) -> None:
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        config, options = VqganConfig(**before["config"]), TrainOptions(**before["options"])
        names = before["pictures"]
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
    old = {**config.model_dump(mode="json"), **options.model_dump(mode="json"), "pictures": names}
    new = {**facts["config"], **facts["options"], "pictures": facts["pictures"]}
    for key, value in new.items():
        if key not in ("steps", "log_every", "save_every") and value != old[key]:
            told = "" if key == "pictures" else f": {old[key]} there, {value} here"
            raise UsageError(f"{path.parent}: holds a run with other {key}{told}; name another folder to begin anew")


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole file ({error}); remove it to begin anew") from None


def _save(trainer: VqganTrainer, out: Path) -> None:
    """The state takes its name when it is whole; then the model as it would be kept now."""
    partial = out / f"{STATE_FILE}.partial"
    save_file({name: tensor.contiguous() for name, tensor in trainer.state().items()}, partial)
    partial.replace(out / STATE_FILE)
    write_folder(out / MODEL, VqganWeights(trainer.config, trainer.kept(), f"the run in {out}"))


class _Lines:
    """Gathers steps into lines: means, and the share of the codebook that was used since the last."""

    def __init__(self, trainer: VqganTrainer, path: Path, note: Callable[[str], None]) -> None:
        self._trainer, self._path, self._note = trainer, path, note
        self._rows: list[dict[str, Any]] = []
        self._used = torch.zeros(trainer.config.codes, dtype=torch.bool)
        self._since = time.monotonic()

    def step(self, row: dict[str, Any]) -> None:
        codes = row.pop("codes", None)
        if codes is not None:
            self._used[codes] = True
        self._rows.append(row)
        options = self._trainer.options
        if self._trainer.step % options.log_every == 0 or self._trainer.step == options.steps:
            self._tell()

    def _tell(self) -> None:
        rows, options, done = self._rows, self._trainer.options, self._trainer.step
        seconds = (time.monotonic() - self._since) / len(rows)
        facts: dict[str, Any] = {
            "step": done,
            "loss": sum(row["loss"] for row in rows) / len(rows),
            "psnr": sum(row["psnr"] for row in rows) / len(rows),
            "codes_used": float(self._used.float().mean()),
            "restarted": sum(row.get("restarted", 0.0) for row in rows),
            "pictures_per_second": options.batch / seconds,
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")
        self._note(
            f"step {done}/{options.steps} · loss {facts['loss']:.4f} · PSNR {facts['psnr']:.2f} dB · "
            f"codes used {facts['codes_used']:.0%} · restarted {facts['restarted']:.0f} · "
            f"{facts['pictures_per_second']:.1f} pictures/s · {clock(seconds * (options.steps - done))} left"
        )
        self._rows.clear()
        self._used.zero_()
        self._since = time.monotonic()
