"""The suite ``reconstruction``: what a run's encoder keeps of pictures, ``decode(encode(frames))`` beside the frames.

It asks nothing of the model: the encoder does not change in a run, so it is measured once, at the first stage.

Shapes: T frames [T,H,W,3] uint8, codes [T,n].
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lwm_core.errors import ShapeError
from lwm_core.frames import uniform_frames
from lwm_core.packaged import locate
from lwm_core.protocols import EvalContext, EvalSetup, VisionEncoder
from lwm_evals.files import Row, write_atomically
from lwm_evals.grid import beside, read_results
from lwm_evals.options import ReconstructionOptions
from lwm_evals.pictures import background, pictures
from lwm_evals.read_frames import find_files, read_frames, told_by
from lwm_evals.similarity import WINDOW, psnr, ssim

SHOWN, SHOWN_SIDE = 6, 192
"""Frames of the figure at most, and their side in pixels at most."""

_GAP = 4  # pixels between two of them


class ReconstructionSuite:
    """PSNR, SSIM and use of the codebook; see :class:`ReconstructionOptions` for what can be set.

    ``<out>.json`` holds ``rows`` ``{frame, name, psnr, ssim, codes_used}`` (``psnr`` in dB, none where a frame came
    back to the bit) and one ``summary`` row ``{frames, psnr, worst_psnr, ssim, exact, codes_used, usage, perplexity}``:
    means over frames, of PSNR over those that did not come back to the bit (``exact`` did); ``usage`` is the share of
    the codebook that occurs, ``perplexity`` e to the entropy of the codes' frequencies. ``<out>.png`` shows frames, and
    what became of them below.
    """

    def __init__(self, options: ReconstructionOptions | None = None) -> None:
        self.options = options or ReconstructionOptions()

    def check(self, setup: EvalSetup) -> None:
        """See :class:`lwm_core.protocols.ChecksSetup`.

        Raises:
            DataError: there is no picture or video at the path.
            ShapeError: the encoder's frames are too small for SSIM.
        """
        side = cast(VisionEncoder, setup.encoder).frame_size
        if side < WINDOW:
            raise ShapeError(
                f"reconstruction: the encoder's frames are {side} × {side}; expected at least {WINDOW} a side, for "
                "SSIM; leave the suite out"
            )
        if self.options.path is not None:
            with told_by("reconstruction"):
                find_files(locate(self.options.path, setup.base_dir))

    def run(self, context: EvalContext) -> Sequence[Mapping[str, Any]]:
        """Measure, unless the same frames and encoder were measured before; the summary row has no stage.

        Raises:
            DataError: the frames cannot be read.
        """
        encoder = cast(VisionEncoder, context.encoder)
        frames, names = self._frames(context, encoder.frame_size)
        said = f"{encoder.checksum} {frames.shape} {names}".encode() + frames.tobytes()
        measured = hashlib.sha256(said).hexdigest()[:12]
        context.progress(0, 1)
        results = read_results(context.out)
        if results.get("measured") != measured or not beside(context.out, ".png").exists():
            codes = encoder.encode(frames)
            made = encoder.decode(codes)
            rows, summary = measure(frames, made, codes, encoder.codes, names)
            results = {"measured": measured, "rows": rows, "summary": [summary]}
            write_atomically(beside(context.out, ".png"), side_by_side(frames, made))
            write_atomically(beside(context.out, ".json"), (json.dumps(results, indent=1) + "\n").encode())
        context.progress(1, 1)
        return list(results["summary"])

    def draw(self, out: Path) -> Mapping[str, bytes]:
        """The picture of frames before and after."""
        path = beside(out, ".png")
        return {"Reconstruction": path.read_bytes()} if path.exists() else {}

    def _frames(self, context: EvalContext, side: int) -> tuple[NDArray[np.uint8], list[str]]:
        if self.options.path is not None:
            with told_by("reconstruction"):
                return read_frames(locate(self.options.path, context.base_dir), side, self.options.frames)
        shapes, shown = pictures("shape", side)
        digits, figures = pictures("digit", side)
        random = np.random.default_rng(context.seed)
        scenes = background(random, 64, side)
        every = np.concatenate([shown, figures, scenes])
        names = [*shapes, *digits, *(f"scene {number}" for number in range(len(scenes)))]
        # At random, for pictures stand in the order of their colours: every n-th may be of one colour alone.
        chosen = np.sort(random.permutation(len(every))[: self.options.frames])
        return every[chosen], [names[int(i)] for i in chosen]


def measure(
    frames: NDArray[np.uint8], made: NDArray[np.uint8], codes: NDArray[np.int32], entries: int, names: Sequence[str]
) -> tuple[list[Row], Row]:
    """A row for each frame, and the summary; ``entries`` is the size of the codebook."""
    ratios, alike = psnr(made, frames), ssim(made, frames)
    rows: list[Row] = [
        {
            "frame": t, "name": names[t], "psnr": float(ratios[t]) if np.isfinite(ratios[t]) else None,
            "ssim": float(alike[t]), "codes_used": len(np.unique(codes[t])),
        }
        for t in range(len(frames))
    ]  # fmt: skip
    counts = np.bincount(codes.ravel(), minlength=entries)
    shares = counts[counts > 0] / codes.size
    finite = ratios[np.isfinite(ratios)]
    summary: Row = {
        "frames": len(frames),
        "psnr": float(finite.mean()) if len(finite) else None,
        "worst_psnr": float(finite.min()) if len(finite) else None,
        "ssim": float(alike.mean()),
        "exact": len(ratios) - len(finite),
        "codes_used": len(shares),
        "usage": len(shares) / entries,
        "perplexity": float(np.exp(-(shares * np.log(shares)).sum())),
    }
    return rows, summary


def side_by_side(frames: NDArray[np.uint8], made: NDArray[np.uint8]) -> bytes:
    """A PNG: some of the frames in a row, and what became of each below it."""
    chosen = uniform_frames(len(frames), SHOWN)
    side = min(frames.shape[1], SHOWN_SIDE)
    sheet = Image.new("RGBA", (len(chosen) * (side + _GAP) - _GAP, 2 * side + _GAP))
    for y, row in enumerate((frames, made)):
        for x, number in enumerate(chosen.tolist()):
            tile = Image.fromarray(row[number]).resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(tile, (x * (side + _GAP), y * (side + _GAP)))
    buffer = BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
