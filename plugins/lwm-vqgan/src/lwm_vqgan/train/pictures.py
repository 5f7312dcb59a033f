"""Pictures for training: decoded once, at several sizes, into one file that is mapped into memory.

Shapes: B crops of [frame_size, frame_size, 3] uint8.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lwm_core.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SCALES = (1.0, 1.25, 1.6, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Shortest sides at which a picture is kept, in frames; those beyond its own are left out."""

_PIXELS, _INDEX = "pictures.bin", "pictures.json"


@dataclass(frozen=True)
class Level:
    """One size of a picture: where its ``height × width × 3`` bytes begin."""

    offset: int
    height: int
    width: int


class Pictures:
    """The decoded pictures of a folder that :func:`decode_pictures` wrote."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError: the folder holds no decoded pictures."""
        try:
            index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            self._bytes = np.memmap(folder / _PIXELS, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise DataError(f"{folder}: holds no decoded pictures ({error}); decode them again") from None
        self.frame_size = int(index["frame_size"])
        self.names = [str(row["name"]) for row in index["pictures"]]
        self.levels = [[Level(*level) for level in row["levels"]] for row in index["pictures"]]

    def batch(self, seed: int, step: int, size: int, *, jitter: bool = True) -> NDArray[np.uint8]:
        """The crops of a step, a function of (seed, step) alone: [size, frame_size, frame_size, 3] uint8.

        Args:
            jitter: also change colours at random. A picture at random, a size of it at random, a place at random,
                half of them mirrored; so each picture counts alike, however large.
        """
        rng = np.random.default_rng((seed, step))
        return np.stack([self._crop(rng, jitter) for _ in range(size)])

    def _crop(self, rng: np.random.Generator, jitter: bool) -> NDArray[np.uint8]:
        side = self.frame_size
        levels = self.levels[int(rng.integers(len(self.levels)))]
        level = levels[int(rng.integers(len(levels)))]
        top = int(rng.integers(level.height - side + 1))
        left = int(rng.integers(level.width - side + 1))
        whole = self._bytes[level.offset : level.offset + level.height * level.width * 3]
        crop = whole.reshape(level.height, level.width, 3)[top : top + side, left : left + side]
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        return _recolour(rng, crop) if jitter else np.ascontiguousarray(crop)


def _recolour(rng: np.random.Generator, crop: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Half of the crops with their channels in another order, and all with another contrast and brightness.

    A few dozen pictures hold few colours; a codebook fit to them alone would have none for the rest.
    """
    if rng.random() < 0.5:
        crop = crop[..., rng.permutation(3)]
    contrast, brightness = rng.uniform(0.7, 1.2), rng.uniform(-24.0, 24.0)
    pixels = (crop.astype(np.float32) - 127.5) * contrast + (127.5 + brightness)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def find_pictures(places: Iterable[Path]) -> list[Path]:
    """The picture files among ``places``, and in those that are folders, at any depth; sorted, each once.

    Raises:
        DataError: a place does not exist, or there is no picture at all.
    """
    found: set[Path] = set()
    for place in places:
        if not place.exists():
            raise DataError(f"{place}: there is no such file or folder")
        inside = place.rglob("*") if place.is_dir() else (place,)
        found |= {path.resolve() for path in inside if path.suffix.lower() in SUFFIXES and path.is_file()}
    if not found:
        raise DataError(f"{', '.join(map(str, places))}: no picture found; expected {', '.join(SUFFIXES)}")
    return sorted(found)


def decode_pictures(
    files: Sequence[Path], folder: Path, frame_size: int, *, note: Callable[[str], None] = print
) -> Pictures:
    """Decode ``files`` into ``folder``, at every size of :data:`SCALES`.

    Args:
        note: told of every picture that is left out, and why.

    Raises:
        DataError: no picture is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, offset = [], 0
    with (folder / _PIXELS).open("wb") as out:
        for path in files:
            try:
                sizes = _sizes(path, frame_size)
            except (OSError, ValueError) as error:  # PIL's own errors for files that are not what their name says
                note(f"left out: {path}: {error}")
                continue
            levels = []
            for pixels in sizes:
                levels.append([offset, *pixels.shape[:2]])
                offset += out.write(pixels.tobytes())
            rows.append({"name": path.name, "levels": levels})
    if not rows:
        raise DataError(f"none of {len(files)} pictures can be used; expected at least {frame_size} pixels a side")
    index = {"frame_size": frame_size, "pictures": rows}
    (folder / _INDEX).write_text(json.dumps(index), encoding="utf-8")
    return Pictures(folder)


def _sizes(path: Path, frame_size: int) -> list[NDArray[np.uint8]]:
    from PIL import Image

    with Image.open(path) as image:
        if min(image.size) < frame_size:
            raise ValueError(f"{image.width}×{image.height} pixels; expected at least {frame_size} a side")
        largest = int(frame_size * SCALES[-1])
        image.draft("RGB", (largest, largest))  # JPEG: decoded at a fraction of its size, which is faster
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        whole = image.convert("RGB")
    short, sizes = min(whole.size), []
    for scale in SCALES:
        side = round(frame_size * scale)
        if side > short:
            break
        to = (max(side, round(whole.width * side / short)), max(side, round(whole.height * side / short)))
        sizes.append(np.asarray(whole.resize(to, Image.Resampling.BOX, reducing_gap=3.0)))
    return sizes
