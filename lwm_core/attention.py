"""What an attention backend computes: the mask, the block contract, and which blocks a rank executes.

**The mask is an interval.** For every kind, query q sees key k exactly when their segment ids are equal and not 0 and
``low[q] <= index[k] <= high[q]``, where an index is a token's place in the row in natural order. Kernels therefore
need two integers a query, one a key, and the segment ids: never an S×S array, whatever the kind or the layout.

**The block contract**, in every framework: ``fwd(q, k, v, mask) -> (out, lse)`` and
``bwd(do, q, k, v, out, lse) -> (dq, dk, dv)``. ``lse`` is the natural-log sum of exponentials in float32, −inf for a
row with nothing to see, whose ``out`` is 0 and whose gradients are 0. Accumulators, merges and dK/dV are float32
whatever the inputs. Two blocks merge with logaddexp, and a block whose lse is −inf has weight 0.

Shapes: B batch, S sequence (of queries Sq, of keys Sk), H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lwm_core.errors import ShapeError, UnsupportedError
from lwm_core.layout import SequenceLayout

MaskKind = Literal["causal", "full", "block_causal"]
MASK_KINDS: tuple[str, ...] = get_args(MaskKind)

Bounds = tuple[NDArray[np.int32], NDArray[np.int32]]


@dataclass(frozen=True)
class AttentionMask:
    """Which keys a query may see, before documents are told apart (segment ids are passed beside it).

    Args:
        kind: ``causal`` (itself and what came before), ``full`` (everything), or ``block_causal`` (its own block whole
            and the blocks before; blocks of ``block`` tokens counted from the document's start).
        window: a query sees only the ``window`` newest tokens it may see. Causal kinds only. In a block that is
            counted back from the block's last token, so a window smaller than a block could leave out the query
            itself and is refused.
        block: tokens a block; with ``block_causal`` only.

    Raises:
        UnsupportedError: the kind is unknown, a full mask has a window, or the window is smaller than a block.
        ShapeError: window or block is not positive, or block is missing or not wanted.
    """

    kind: MaskKind = "causal"
    window: int | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in MASK_KINDS:
            raise UnsupportedError(f"mask kind {self.kind!r} is unknown; expected one of {', '.join(MASK_KINDS)}")
        if (self.block is not None) != (self.kind == "block_causal"):
            raise ShapeError(f"mask {self.kind!r}: block is {self.block}; it goes with 'block_causal' and only there")
        for name, value in (("window", self.window), ("block", self.block)):
            if value is not None and value < 1:
                raise ShapeError(f"mask {self.kind!r}: {name} is {value}; expected at least 1")
        if self.window is not None and self.kind == "full":
            raise UnsupportedError("mask 'full' with a window is refused: newest has no meaning there; use 'causal'")
        if self.window is not None and self.block is not None and self.window < self.block:
            raise UnsupportedError(
                f"mask 'block_causal': window {self.window} is smaller than block {self.block}, so that a query "
                "might not see itself; use a window of at least a block"
            )


def document_bounds(segment_ids: NDArray[np.integer]) -> Bounds:
    """First and last natural index of each token's run of equal segment ids, each ``[B, S]``; natural order."""
    ids = np.asarray(segment_ids)
    index = np.broadcast_to(np.arange(ids.shape[-1], dtype=np.int32), ids.shape)
    change = np.ones(ids.shape, dtype=bool)
    change[..., 1:] = ids[..., 1:] != ids[..., :-1]
    first = np.maximum.accumulate(np.where(change, index, 0), axis=-1)
    ends = np.ones(ids.shape, dtype=bool)
    ends[..., :-1] = change[..., 1:]
    last_reversed = np.minimum.accumulate(np.where(ends, index, ids.shape[-1] - 1)[..., ::-1], axis=-1)
    return first.astype(np.int32), last_reversed[..., ::-1].astype(np.int32)


def mask_bounds(mask: AttentionMask, seq_len: int, segment_ids: NDArray[np.integer] | None = None) -> Bounds:
    """``low`` and ``high`` natural index that each query may see, natural order.

    Returns:
        Two int32 arrays: ``[S]``, or ``[B, S]`` for ``block_causal`` with documents (blocks count from each start).
    """
    index = np.arange(seq_len, dtype=np.int32)
    if mask.kind == "full":
        return np.zeros_like(index), np.full_like(index, seq_len - 1)
    if mask.kind == "causal":
        high = index
    else:
        block = mask.block or 1
        if segment_ids is None:
            first, last = np.zeros_like(index), np.full_like(index, seq_len - 1)
        else:
            first, last = document_bounds(segment_ids)
        high = np.minimum(first + ((index - first) // block + 1) * block - 1, last).astype(np.int32)
    low = np.zeros_like(high) if mask.window is None else np.maximum(high - np.int32(mask.window - 1), 0)
    return low.astype(np.int32), high


def executed_blocks(
    mask: AttentionMask,
    layout: SequenceLayout,
    seq_len: int,
    block_size: int,
    segment_ids: NDArray[np.integer] | None = None,
) -> NDArray[np.int64]:
    """How many ``block_size``-square blocks each rank computes over a whole ring, all hops together.

    A rank cuts each run of its tokens into blocks; a block of queries meets a block of keys when some key in it may
    be visible by the interval rule and the two blocks' segment ids overlap.

    Args:
        segment_ids: ``[S]`` of one row in natural order, or None.

    Returns:
        ``[world]`` int64.

    Raises:
        ShapeError: the length does not divide, or a block does not divide a run of a rank's tokens.
    """
    runs = layout.runs(seq_len)
    run = len(range(*runs[0][0].indices(seq_len)))
    if run % block_size:
        raise ShapeError(f"executed_blocks: block_size {block_size} does not divide a run of {run} tokens")
    low, high = mask_bounds(mask, seq_len, None if segment_ids is None else np.asarray(segment_ids)[None])
    low, high = low.reshape(-1, seq_len)[0], high.reshape(-1, seq_len)[0]
    ids = np.ones(seq_len, np.int32) if segment_ids is None else np.asarray(segment_ids)
    blocks = layout.permutation(seq_len).reshape(layout.world, -1, block_size)
    flat = blocks.reshape(-1, block_size)
    key_min, key_max = flat.min(axis=1), flat.max(axis=1)
    id_min, id_max = ids[flat].min(axis=1), ids[flat].max(axis=1)
    counts = np.zeros(layout.world, dtype=np.int64)
    for rank in range(layout.world):
        for queries in blocks[rank]:
            live = (key_min <= high[queries].max()) & (key_max >= low[queries].min())
            live &= (id_min <= ids[queries].max()) & (id_max >= ids[queries].min()) & (id_max > 0)
            counts[rank] += int(live.sum()) if ids[queries].max() > 0 else 0
    return counts


def needed_hops(mask: AttentionMask, layout: SequenceLayout, seq_len: int) -> tuple[int, ...]:
    """Hops h at which some rank r sees a key of rank (r − h) mod world, ascending; hop 0 is always one of them.

    A ring may leave the others out: with a window most of it has nothing to bring. Documents are not looked at, since
    they change from batch to batch.

    Raises:
        ShapeError: the length does not divide.
    """
    runs = layout.runs(seq_len)
    ends = np.array([[(part.start, part.stop - 1) for part in rank] for rank in runs])  # [world, runs, 2]
    # Blocks are counted from a document's start, so that they may end up to a block further on than in a whole row.
    ahead = {"causal": 0, "block_causal": (mask.block or 1) - 1, "full": seq_len}[mask.kind]
    behind = seq_len if mask.window is None else mask.window - 1
    queries, keys = ends[:, None, :, None], ends[None, :, None, :]  # [world, world, runs, runs, 2]
    meets = (keys[..., 0] <= queries[..., 1] + ahead) & (keys[..., 1] >= queries[..., 0] - behind)
    query_rank, key_rank = np.nonzero(meets.any(axis=(2, 3)))
    return tuple(int(hop) for hop in np.unique((query_rank - key_rank) % layout.world))
