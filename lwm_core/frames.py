"""Frame blocks: the codes of a picture or a clip as ids and back.

The block of a frame is its codes and one delimiter: ``eof``, or ``eov`` after the last frame of a clip. A picture is a
clip of one frame (arXiv 2402.08268, section 4).

Shapes: T frames of n codes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lwm_core.errors import ShapeError
from lwm_core.vocab import Vocabulary


def frame_tokens(codes: NDArray[np.integer], vocabulary: Vocabulary) -> NDArray[np.int32]:
    """``[T,n]`` codes → ``[T·(n+1)]`` int32 ids.

    Raises:
        ShapeError: it is no whole frame, a code is outside the codebook, or the vocabulary has no vision ids.
    """
    codes = np.asarray(codes)
    if codes.ndim != 2 or 0 in codes.shape or codes.dtype.kind not in "iu":
        raise ShapeError(f"frames: codes are {codes.dtype} {list(codes.shape)}; expected whole numbers [T, n], none 0")
    ends = np.full((len(codes), 1), vocabulary.eof, np.int32)
    ends[-1] = vocabulary.eov
    return np.concatenate([vocabulary.vision_ids(codes), ends], axis=1).ravel()


def frame_codes(tokens: NDArray[np.integer], vocabulary: Vocabulary, codes_per_frame: int) -> NDArray[np.int32]:
    """``[T·(n+1)]`` ids of one clip → ``[T,n]`` int32 codes, n being ``codes_per_frame``.

    Raises:
        ShapeError: they are no whole clip: a frame is cut off, a delimiter is missing, in the wrong place or the wrong
            one, or an id is no code.
    """
    tokens, block = np.asarray(tokens), codes_per_frame + 1
    if codes_per_frame < 1:
        raise ShapeError(f"frames: codes_per_frame is {codes_per_frame}; expected at least 1")
    if tokens.ndim != 1 or not tokens.size or tokens.size % block or tokens.dtype.kind not in "iu":
        raise ShapeError(
            f"frames: ids are {tokens.dtype} {list(tokens.shape)}; expected whole numbers [T·{block}]: "
            f"{codes_per_frame} codes and a delimiter a frame"
        )
    blocks = tokens.reshape(-1, block)
    expected = np.full(len(blocks), vocabulary.eof)
    expected[-1] = vocabulary.eov
    wrong = np.flatnonzero(blocks[:, -1] != expected)
    if wrong.size:
        frame = int(wrong[0])
        raise ShapeError(
            f"frames: frame {frame} of {len(blocks)} ends with id {blocks[frame, -1]}; expected {expected[frame]} "
            f"({'eov' if frame == len(blocks) - 1 else 'eof'})"
        )
    codes = blocks[:, :-1].astype(np.int64) - vocabulary.text_size
    wrong = np.flatnonzero(((codes < 0) | (codes >= vocabulary.vision_codes)).ravel())
    if wrong.size:
        frame, at = divmod(int(wrong[0]), codes_per_frame)
        first = vocabulary.text_size
        raise ShapeError(
            f"frames: id {blocks[frame, at]} at place {at} of frame {frame} is no code; expected "
            f"[{first}, {first + vocabulary.vision_codes})"
        )
    return codes.astype(np.int32)
