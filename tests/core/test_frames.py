"""Frame blocks: golden layouts, there and back again, and what is no clip."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_core.errors import ShapeError
from lwm_core.frames import frame_codes, frame_tokens, uniform_frames, vision_tokens
from lwm_core.vocab import Vocabulary

LWM = Vocabulary(32000, 8448)
SMALL = Vocabulary(100, 12, 9)  # codes 100 to 108, eof 109, eov 110


def test_three_frames_of_two_codes() -> None:
    """Written out by hand: each frame ends with eof, the last with eov."""
    ids = frame_tokens(np.array([[0, 8], [3, 4], [5, 5]]), SMALL)
    assert ids.tolist() == [100, 108, 109, 103, 104, 109, 105, 105, 110] and ids.dtype == np.int32


def test_a_picture_is_a_clip_of_one_frame() -> None:
    assert frame_tokens(np.array([[1, 2, 3, 4]]), SMALL).tolist() == [101, 102, 103, 104, 110]


@pytest.mark.parametrize("frames", [1, 2, 30])
def test_lwms_clips_are_257_tokens_a_frame_and_the_last_is_eov(frames: int) -> None:
    """8193 is LWM's eov; kept as uint16, the largest code does not wrap round."""
    codes = np.full((frames, 256), 8191, np.uint16)
    ids = frame_tokens(codes, Vocabulary(65_000, 8448))
    assert len(ids) == vision_tokens(frames, 256) == 257 * frames
    assert ids[-1] - 65_000 == 8193 and (np.delete(ids[256::257], -1) - 65_000 == 8192).all()
    assert set(np.delete(ids, np.s_[256::257]).tolist()) == {65_000 + 8191}


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**32 - 1), st.sampled_from(["<u2", "<i4", "<i8"]))
def test_codes_come_back(frames: int, width: int, seed: int, dtype: str) -> None:
    codes = np.random.default_rng(seed).integers(0, 9, (frames, width)).astype(dtype)
    ids = frame_tokens(codes, SMALL)
    assert SMALL.is_vision(ids).all() and (ids == SMALL.eov).sum() == 1 and (ids == SMALL.eof).sum() == frames - 1
    back = frame_codes(ids, SMALL, width)
    assert back.dtype == np.int32 and np.array_equal(back, codes)


def changed(at: int, to: int) -> np.ndarray:
    ids = frame_tokens(np.zeros((3, 2), int), SMALL)
    ids[at] = to
    return ids


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (np.zeros(0, int), r"ids are int64 \[0\]; expected whole numbers \[T·3\]: 2 codes and a delimiter a frame"),
        (changed(0, 100)[:-1], r"\[8\]; expected whole numbers"),
        (changed(0, 100).reshape(3, 3), r"\[3, 3\]; expected whole numbers"),
        (changed(0, 100) / 1, "float64"),
        (changed(2, 110), r"frame 0 of 3 ends with id 110; expected 109 \(eof\)"),
        (changed(5, 101), r"frame 1 of 3 ends with id 101; expected 109 \(eof\)"),
        (changed(8, 109), r"frame 2 of 3 ends with id 109; expected 110 \(eov\)"),
        (changed(4, 99), r"id 99 at place 1 of frame 1 is no code; expected \[100, 109\)"),
        (changed(3, 109), "id 109 at place 0 of frame 1 is no code"),
        (changed(3, 111), "id 111 at place 0 of frame 1 is no code"),
    ],
)
def test_what_is_no_clip_is_refused_in_one_line(ids: np.ndarray, words: str) -> None:
    with pytest.raises(ShapeError, match=words) as caught:
        frame_codes(ids, SMALL, 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("codes", [np.zeros((0, 4), int), np.zeros((2, 0), int), np.zeros(4, int), np.zeros((1, 4))])
def test_what_is_no_array_of_codes_is_refused(codes: np.ndarray) -> None:
    with pytest.raises(ShapeError, match=r"expected whole numbers \[T, n\], none 0"):
        frame_tokens(codes, SMALL)


def test_codes_outside_the_codebook_and_models_without_vision_are_refused() -> None:
    with pytest.raises(ShapeError, match="0 to 8191"):
        frame_tokens(np.array([[8192]]), LWM)
    for ask in (
        lambda: frame_tokens(np.array([[0]]), Vocabulary(9)),
        lambda: frame_codes(np.array([0, 1]), Vocabulary(9), 1),
    ):
        with pytest.raises(ShapeError, match="no vision ids"):
            ask()


@given(st.integers(1, 5000), st.integers(1, 400))
def test_uniform_frames_are_linspaces(count: int, most: int) -> None:
    """NumPy's own linspace, cut to whole numbers; first and last frame are kept, and none comes twice."""
    frames = uniform_frames(count, most)
    if count <= most:
        assert frames.tolist() == list(range(count))
        return
    np.testing.assert_array_equal(frames, np.linspace(0, count - 1, most).astype(int))
    assert frames[0] == 0 and (most == 1 or frames[-1] == count - 1) and (np.diff(frames) > 0).all()


def test_uniform_frames_are_lwms() -> None:
    assert uniform_frames(132, 8).tolist() == [0, 18, 37, 56, 74, 93, 112, 131]
    assert uniform_frames(3, 8).tolist() == [0, 1, 2] and uniform_frames(5, 1).tolist() == [0]
