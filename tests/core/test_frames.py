"""Frame blocks: where the delimiters stand, what comes back, and what is no clip."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_core.errors import ShapeError
from lwm_core.frames import frame_codes, frame_tokens
from lwm_core.vocab import Vocabulary

VOCABULARY = Vocabulary(100, 20, 16)
EOF, EOV = 116, 117


@given(frames=st.integers(1, 5), length=st.integers(1, 7), seed=st.integers(0, 99))
def test_blocks_are_codes_and_a_delimiter_and_come_back(frames: int, length: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 16, (frames, length))
    tokens = frame_tokens(codes, VOCABULARY)
    by_hand: list[int] = []
    for frame in codes.tolist():
        by_hand += [100 + code for code in frame] + [EOF]
    assert tokens.tolist() == [*by_hand[:-1], EOV] and tokens.dtype == np.int32
    assert np.array_equal(frame_codes(tokens, VOCABULARY, length), codes)


def test_lwms_layout() -> None:
    """256 codes a frame: 257 ids, the last 8193 after the text (arXiv 2402.08268, section 4)."""
    tokens = frame_tokens(np.zeros((3, 256), np.uint16), Vocabulary(32_000, 8448))
    assert len(tokens) == 3 * 257
    assert tokens[[256, 513, 770]].tolist() == [32_000 + 8192, 32_000 + 8192, 32_000 + 8193]


@pytest.mark.parametrize(
    ("codes", "part"),
    [
        (np.zeros((0, 4), int), r"\[0, 4\]; expected"),
        (np.zeros(4, int), r"\[4\]; expected"),
        (np.zeros((2, 4)), "float64"),
        (np.full((1, 4), 16), "run from 16 to 16"),
        (np.full((1, 4), -1), "run from -1 to -1"),
    ],
)
def test_what_are_no_codes(codes: np.ndarray, part: str) -> None:
    with pytest.raises(ShapeError, match=part):
        frame_tokens(codes, VOCABULARY)


@pytest.mark.parametrize(
    ("tokens", "part"),
    [
        ([], r"\[0\]; expected"),
        ([100, 101, EOF, 100, EOV], r"\[5\]; expected whole numbers \[T·3\]: 2 codes and a delimiter"),
        ([100, 101, EOV, 100, 101, EOV], r"frame 0 of 2 ends with id 117; expected 116 \(eof\)"),
        ([100, 101, EOF, 100, 101, EOF], r"frame 1 of 2 ends with id 116; expected 117 \(eov\)"),
        ([100, 101, 102], r"frame 0 of 1 ends with id 102"),
        ([100, EOF, EOV], r"id 116 at place 1 of frame 0 is no code; expected \[100, 116\)"),
        ([99, 100, EOV], "id 99 at place 0"),
        ([100, 118, EOV], "id 118 at place 1"),
        ([[100, 101, EOV]], "expected whole numbers"),
    ],
)
def test_what_is_no_clip(tokens: list[int], part: str) -> None:
    with pytest.raises(ShapeError, match=part):
        frame_codes(np.array(tokens, np.int32), VOCABULARY, 2)


def test_a_text_model_has_no_frames() -> None:
    with pytest.raises(ShapeError, match="no vision ids"):
        frame_tokens(np.zeros((1, 4), int), Vocabulary(100))
