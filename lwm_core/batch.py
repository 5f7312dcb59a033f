"""The two records that carry tokens across borders: one example, and a batch of packed rows. NumPy, frozen.

Shapes: B rows of a batch, S tokens of a row, N tokens of an example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from lwm_core.errors import ShapeError

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]


def _frozen(array: object, dtype: type) -> NDArray[np.generic]:
    result: NDArray[np.generic] = np.array(array, dtype=dtype, copy=True)
    result.setflags(write=False)
    return result


@dataclass(frozen=True)
class TokenSequence:
    """One example: a document, a question with its answer, a clip with its caption. Positions are implied.

    Args:
        ids: ``[N]`` int32 token ids.
        loss_weights: ``[N]`` float32; the weight of token n as a *target*. 0 where nothing is to be learnt.

    Raises:
        ShapeError: the two are not of one length, or a weight is negative or not finite.
    """

    ids: IntArray
    loss_weights: FloatArray

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", _frozen(self.ids, np.int32))
        object.__setattr__(self, "loss_weights", _frozen(self.loss_weights, np.float32))
        if self.ids.ndim != 1 or self.ids.shape != self.loss_weights.shape:
            raise ShapeError(
                f"TokenSequence: ids {self.ids.shape} and loss_weights {self.loss_weights.shape} "
                "must be of one length and one dimension"
            )
        if not np.all(np.isfinite(self.loss_weights)) or np.any(self.loss_weights < 0):
            raise ShapeError("TokenSequence: loss_weights must be finite and not negative")

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class PackedBatch:
    """Rows of documents laid end to end, all ``[B, S]``.

    Args:
        tokens: int32 inputs.
        targets: int32; ``targets[b, s]`` is the token after ``tokens[b, s]`` *in its document*, shifted before any
            layout permutes the row. A document's last token may have one too where its feed knows what follows.
        segment_ids: int32; the document number in the row, from 1; 0 is padding.
        positions: int32; restart at 0 in each document; feed RoPE only.
        loss_weights: float32; the weight of each target; 0 where there is no target, and at padding.

    Raises:
        ShapeError: shapes differ, or padding carries loss weight.
    """

    tokens: IntArray
    targets: IntArray
    segment_ids: IntArray
    positions: IntArray
    loss_weights: FloatArray

    def __post_init__(self) -> None:
        for field in fields(self):
            dtype = np.float32 if field.name == "loss_weights" else np.int32
            object.__setattr__(self, field.name, _frozen(getattr(self, field.name), dtype))
        shapes = {field.name: getattr(self, field.name).shape for field in fields(self)}
        if len(set(shapes.values())) != 1 or self.tokens.ndim != 2:
            raise ShapeError(f"PackedBatch: all five arrays must be [B, S] of one shape, got {shapes}")
        if np.any(self.loss_weights[self.segment_ids == 0]):
            raise ShapeError("PackedBatch: padding (segment id 0) carries loss weight; it must be 0 there")

    @property
    def shape(self) -> tuple[int, int]:
        """(B, S)."""
        rows, length = self.tokens.shape
        return rows, length

    def map(self, function) -> PackedBatch:  # type: ignore[no-untyped-def]
        """The batch with ``function`` applied to each of its arrays (a slice of rows, a permutation of tokens)."""
        return PackedBatch(*(function(getattr(self, field.name)) for field in fields(self)))


def pack_rows(rows: Sequence[Sequence[TokenSequence]], seq_len: int) -> PackedBatch:
    """Lay each row's examples end to end, pad to ``seq_len``, and shift the targets inside each example.

    An example's last token has no target, and no token's target is another example's first.

    Raises:
        ShapeError: a row's examples are longer than ``seq_len`` together, or an example is empty.
    """
    shape = (len(rows), seq_len)
    tokens, targets, segments, positions = (np.zeros(shape, np.int32) for _ in range(4))
    weights = np.zeros(shape, np.float32)
    for b, examples in enumerate(rows):
        start = 0
        for number, example in enumerate(examples, start=1):
            n = len(example)
            end = start + n
            if n == 0 or end > seq_len:
                raise ShapeError(
                    f"pack_rows: row {b}, example {number} has {n} tokens and ends at {end}; "
                    f"expected at least one token and an end within seq_len = {seq_len}"
                )
            tokens[b, start:end] = example.ids
            targets[b, start : end - 1] = example.ids[1:]
            weights[b, start : end - 1] = example.loss_weights[1:]
            segments[b, start:end] = number
            positions[b, start:end] = np.arange(n)
            start = end
    return PackedBatch(tokens, targets, segments, positions, weights)
