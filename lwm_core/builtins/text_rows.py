"""The feed ``text-file``: rows cut from one text at places that depend on (seed, stage, step, row) alone.

Shapes: B rows of this data rank, S tokens of a row, N tokens of the training part of the text.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from lwm_core.batch import PackedBatch
from lwm_core.errors import DataError, ShapeError
from lwm_core.protocols import DataContext, FeedRequest

SHIPPED = "shipped:"
"""Prefix of a path that means a text inside the lwm-core package: ``shipped:genesis``."""


class TextFileOptions(BaseModel):
    """Options of ``text-file``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(description="a UTF-8 text file, from the folder the command runs in; or shipped:genesis")
    held_out: float = Field(0.1, ge=0, lt=1, description="fraction of the text, at its end, that is never trained on")


class TextFileSource:
    """A text as one line of tokens; a row is any S + 1 of them that follow each other."""

    def __init__(self, options: TextFileOptions, context: DataContext) -> None:
        text = read_text(options.path, context.base_dir)
        cut = len(text) - round(len(text) * options.held_out)
        self._path = options.path
        self._held_out = text[cut:]
        self._ids = np.asarray(context.tokenizer.encode(text[:cut]), dtype=np.int32)
        self._seed = context.seed
        if not len(self._ids):
            raise DataError(f"data 'text-file': {options.path} has no text to train on after held_out is taken")

    def open(self, request: FeedRequest) -> TextFileFeed:
        """The feed of a data rank.

        Raises:
            DataError: the text is shorter than one row and its last target.
            ShapeError: the rows do not divide over the data ranks.
        """
        if len(self._ids) < request.seq_len + 1:
            raise DataError(
                f"data 'text-file': {self._path} has {len(self._ids)} tokens to train on; a row of seq_len = "
                f"{request.seq_len} needs {request.seq_len + 1}; use a longer text or a smaller seq_len"
            )
        if request.rows % request.world:
            raise ShapeError(
                f"data 'text-file': {request.rows} rows a step do not divide over {request.world} data ranks; "
                "change the stage's batch_tokens or mesh"
            )
        return TextFileFeed(self._ids, self._seed, request)

    def held_out(self) -> list[str]:
        """The end of the text, which no row is cut from."""
        return [self._held_out] if self._held_out else []


class TextFileFeed:
    """Rows ``[rank · B, (rank + 1) · B)`` of every step."""

    def __init__(self, ids: NDArray[np.int32], seed: int, request: FeedRequest) -> None:
        self._ids = ids
        self._seed = seed
        self._request = request

    def batch(self, step: int) -> PackedBatch:
        """``[B, S]`` rows of ``step``: one document a row, every token a target of weight 1/S."""
        request = self._request
        count = request.rows // request.world
        first = request.rank * count
        starts = [self._start(step, row) for row in range(first, first + count)]
        window = np.stack([self._ids[start : start + request.seq_len + 1] for start in starts])
        shape = (count, request.seq_len)
        return PackedBatch(
            tokens=window[:, :-1],
            targets=window[:, 1:],
            segment_ids=np.ones(shape, np.int32),
            positions=np.broadcast_to(np.arange(request.seq_len, dtype=np.int32), shape),
            loss_weights=np.full(shape, 1.0 / request.seq_len, np.float32),
        )

    def _start(self, step: int, row: int) -> int:
        random = np.random.default_rng([self._seed, self._request.stage_index, step, row])
        return int(random.integers(len(self._ids) - self._request.seq_len))

    def close(self) -> None:
        """No workers to end."""


def read_text(path: str, base_dir: Path) -> str:
    """The text at ``path``, or the shipped text that it names.

    Raises:
        DataError: it is missing, empty, not a file, or not UTF-8.
    """
    if path.startswith(SHIPPED):
        name = path.removeprefix(SHIPPED)
        folder = files("lwm_core") / "texts"
        shipped = sorted(entry.name.removesuffix(".txt") for entry in folder.iterdir() if entry.name.endswith(".txt"))
        if name not in shipped:
            raise DataError(f"data 'text-file': no text {name!r} is shipped; expected one of {', '.join(shipped)}")
        raw = (folder / f"{name}.txt").read_bytes()
    else:
        full = base_dir / Path(path).expanduser()
        try:
            raw = full.read_bytes()
        except FileNotFoundError:
            raise DataError(f"data 'text-file': {full.absolute()}: no such file; set data.path to a text") from None
        except OSError as error:
            raise DataError(f"data 'text-file': {full.absolute()}: cannot be read: {error.strerror}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"data 'text-file': {path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not text.strip():
        raise DataError(f"data 'text-file': {path} is empty; expected a text to train on")
    return text


def build(options: TextFileOptions, context: DataContext) -> TextFileSource:
    """The factory."""
    return TextFileSource(options, context)
