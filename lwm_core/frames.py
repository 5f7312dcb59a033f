"""Pictures and clips as tokens: frame blocks in the one id space, and back.

A clip is ``<vision> f1 eof f2 eof ... fT eov </vision>``: ``<vision>`` and ``</vision>`` are ordinary text, each
frame's n codes are followed by ``eof``, the last frame's by ``eov``; a picture is a clip of one frame (LWM, arXiv
2402.08268, section 4). T frames are therefore T·(n + 1) vision tokens, 257·T with LWM's n = 256.

Shapes: T frames, n codes a frame, N = T·(n + 1) vision tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lwm_core.errors import ShapeError
from lwm_core.vocab import Vocabulary

VISION_START = "<vision>"
"""Text before a clip; where a clip is generated, the prompt ends with it."""

VISION_END = "</vision>"
"""Text after a clip."""


def vision_tokens(frames: int, codes_per_frame: int) -> int:
    """N, the vision tokens of a clip of so many frames."""
    return frames * (codes_per_frame + 1)


def clip_ids(codes: NDArray[np.integer], vocabulary: Vocabulary) -> NDArray[np.int32]:
    """``[T, n]`` codes → ``[N]`` ids: each frame's codes, then ``eof``, or ``eov`` after the last.

    Raises:
        ShapeError: there is no frame or no code, the codes are not whole numbers, one is outside the codebook, or the
            vocabulary has no vision ids.
    """
    codes = np.asarray(codes)
    if codes.ndim != 2 or not codes.size or codes.dtype.kind not in "iu":
        raise ShapeError(
            f"clip: {codes.dtype} codes of shape {list(codes.shape)}; expected whole numbers [frames, codes a frame], "
            "at least one frame"
        )
    delimiters = np.full((len(codes), 1), vocabulary.eof, np.int32)
    delimiters[-1] = vocabulary.eov
    # int64 first: the codes may be kept as uint16, where adding the offset of the vision slice would wrap.
    ids = vocabulary.vision_ids(codes.astype(np.int64))
    return np.concatenate([ids, delimiters], axis=1).ravel()


def clip_codes(ids: NDArray[np.integer], codes_per_frame: int, vocabulary: Vocabulary) -> NDArray[np.int32]:
    """``[N]`` ids of a whole clip → ``[T, n]`` codes; the inverse of :func:`clip_ids`.

    Raises:
        ShapeError: the ids are no whole number of frames, a frame does not end with ``eof`` or the last not with
            ``eov``, or an id among the codes is none of a code.
    """
    ids = np.asarray(ids)
    block = codes_per_frame + 1
    if ids.ndim != 1 or not ids.size or ids.size % block or ids.dtype.kind not in "iu":
        raise ShapeError(
            f"clip: {ids.dtype} ids of shape {list(ids.shape)}; expected whole frames of {codes_per_frame} codes and a "
            f"delimiter, a multiple of {block} ids in one dimension"
        )
    frames = ids.astype(np.int64).reshape(-1, block)
    expected = np.full(len(frames), vocabulary.eof)
    expected[-1] = vocabulary.eov
    wrong = np.flatnonzero(frames[:, -1] != expected)
    if wrong.size:
        at = int(wrong[0])
        name = "eov" if at == len(frames) - 1 else "eof"
        raise ShapeError(
            f"clip: frame {at + 1} of {len(frames)} ends with id {frames[at, -1]}; expected {name}, id {expected[at]}"
        )
    first = vocabulary.slices["vision"].start
    codes: NDArray[np.int64] = frames[:, :-1] - first
    outside = np.argwhere((codes < 0) | (codes >= vocabulary.vision_codes))
    if outside.size:
        frame, token = (int(i) for i in outside[0])
        raise ShapeError(
            f"clip: token {token + 1} of frame {frame + 1} is id {frames[frame, token]}; expected a code's, "
            f"{first} to {first + vocabulary.vision_codes - 1}"
        )
    return codes.astype(np.int32)


def uniform_frames(count: int, most: int) -> NDArray[np.int64]:
    """``[min(count, most)]``: all, or ``linspace(0, count - 1, most)`` cut to whole numbers, as LWM's data does."""
    if count <= most:
        return np.arange(count, dtype=np.int64)
    return np.linspace(0, count - 1, most, dtype=np.int64)
