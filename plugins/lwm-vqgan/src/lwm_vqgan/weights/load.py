"""Weights from wherever they are: the package's own, our folder, diffusers' folder, or LWM's file."""

from __future__ import annotations

from pathlib import Path

from lwm_core.errors import CheckpointError
from lwm_vqgan.weights.diffusers_form import read_diffusers
from lwm_vqgan.weights.folder import CONFIG_FILE, EMBEDDED, VqganWeights, read_folder, read_json
from lwm_vqgan.weights.lwm_form import read_lwm

EMBEDDED_NAME = "embedded"


def read_weights(place: str | Path, base_dir: Path = Path(".")) -> VqganWeights:
    """The weights at ``place``: ``"embedded"``, a folder (ours or diffusers'), or LWM's pickled file.

    Args:
        base_dir: where a relative path starts.

    Raises:
        CheckpointError: there is nothing there, or it is none of these.
    """
    if place == EMBEDDED_NAME:
        return read_folder(EMBEDDED)
    path = base_dir / Path(place).expanduser()
    if path.is_file():
        return read_lwm(path)
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: there is no such folder or file; expected {EMBEDDED_NAME!r}, a folder of a VQGAN, or LWM's file"
        )
    return read_diffusers(path) if "_class_name" in read_json(path / CONFIG_FILE) else read_folder(path)
