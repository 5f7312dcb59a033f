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


def frame_tokens(codes: NDArray[np.integer], vocabulary: Vocabulary) -> NDArray[np.int32]:
    """``[T, n]`` codes → ``[N]`` ids: each frame's codes, then ``eof``, or ``eov`` after the last.

    Raises:
        ShapeError: there is no frame or no code, the codes are not whole numbers, one is outside the codebook, or the
            vocabulary has no vision ids.
    """
    codes = np.asarray(codes)
    if codes.ndim != 2 or not codes.size or codes.dtype.kind not in "iu":
        raise ShapeError(f"frames: codes are {codes.dtype} {list(codes.shape)}; expected whole numbers [T, n], none 0")
    delimiters = np.full((len(codes), 1), vocabulary.eof, np.int32)
    delimiters[-1] = vocabulary.eov
    return np.concatenate([vocabulary.vision_ids(codes), delimiters], axis=1).ravel()


def frame_codes(tokens: NDArray[np.integer], vocabulary: Vocabulary, codes_per_frame: int) -> NDArray[np.int32]:
    """``[N]`` ids of a whole clip → ``[T, n]`` codes, n being ``codes_per_frame``; undoes :func:`frame_tokens`.

    Raises:
        ShapeError: the ids are no whole number of frames, a frame does not end with ``eof`` or the last not with
            ``eov``, an id among the codes is none of a code, or ``codes_per_frame`` is not positive.
    """
    tokens, block = np.asarray(tokens), codes_per_frame + 1
    if codes_per_frame < 1:
        raise ShapeError(f"frames: codes_per_frame is {codes_per_frame}; expected at least 1")
    if tokens.ndim != 1 or not tokens.size or tokens.size % block or tokens.dtype.kind not in "iu":
        raise ShapeError(
            f"frames: ids are {tokens.dtype} {list(tokens.shape)}; expected whole numbers [T·{block}]: "
            f"{codes_per_frame} codes and a delimiter a frame"
        )
    blocks = tokens.astype(np.int64).reshape(-1, block)
    expected = np.full(len(blocks), vocabulary.eof)
    expected[-1] = vocabulary.eov
    wrong = np.flatnonzero(blocks[:, -1] != expected)
    if wrong.size:
        frame = int(wrong[0])
        raise ShapeError(
            f"frames: frame {frame} of {len(blocks)} ends with id {blocks[frame, -1]}; expected {expected[frame]} "
            f"({'eov' if frame == len(blocks) - 1 else 'eof'})"
        )
    first = vocabulary.slices["vision"].start
    codes: NDArray[np.int64] = blocks[:, :-1] - first
    outside = np.argwhere((codes < 0) | (codes >= vocabulary.vision_codes))
    if outside.size:
        frame, place = (int(i) for i in outside[0])
        raise ShapeError(
            f"frames: id {blocks[frame, place]} at place {place} of frame {frame} is no code; expected "
            f"[{first}, {first + vocabulary.vision_codes})"
        )
    return codes.astype(np.int32)


def uniform_frames(count: int, most: int) -> NDArray[np.int64]:
    """``[min(count, most)]``: all, or ``linspace(0, count - 1, most)`` cut to whole numbers, as LWM's data does."""
    if count <= most:
        return np.arange(count, dtype=np.int64)
    return np.linspace(0, count - 1, most, dtype=np.int64)
