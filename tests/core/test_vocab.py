"""The one id space: LWM's figures, slices that tile it, and codes that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_core.errors import ShapeError
from lwm_core.vocab import Vocabulary

LWM = Vocabulary(text_size=32000, vision_size=8448)


def test_lwms_own_ids() -> None:
    assert LWM.size == 40448
    assert (LWM.eof, LWM.eov) == (32000 + 8192, 32000 + 8193)
    assert LWM.slices == {"text": slice(0, 32000), "vision": slice(32000, 40448)}


def test_a_text_only_vocabulary_has_no_vision_ids() -> None:
    text = Vocabulary(300)
    assert (text.size, text.slices) == (300, {"text": slice(0, 300)})
    assert not text.is_vision(np.arange(300)).any()
    for ask in (lambda: text.eof, lambda: text.eov, lambda: text.vision_ids(np.array([0]))):
        with pytest.raises(ShapeError, match="no vision ids"):
            ask()


@given(st.integers(1, 500), st.integers(1, 50), st.integers(0, 20))
def test_slices_tile_the_ids_and_tell_the_modality(text_size: int, codes: int, reserve: int) -> None:
    vocabulary = Vocabulary(text_size, codes + 2 + reserve, codes)
    ids = np.arange(vocabulary.size)
    covered = np.concatenate([ids[part] for part in vocabulary.slices.values()])
    assert np.array_equal(covered, ids)
    vision = vocabulary.vision_ids(np.arange(codes))
    assert vocabulary.is_vision(vision).all() and vision.dtype == np.int32
    assert {vocabulary.eof, vocabulary.eov}.isdisjoint(vision.tolist())
    assert vocabulary.eof < vocabulary.eov < vocabulary.size
    assert np.array_equal(vocabulary.is_vision(ids), ids >= text_size)


@pytest.mark.parametrize("text_size", [32_000, 60_000, 128_256])
def test_codes_kept_as_uint16_do_not_wrap_round(text_size: int) -> None:
    """As a folder of codes keeps them; 60,000 and 8191 are more than 16 bits hold."""
    ids = Vocabulary(text_size, 8448).vision_ids(np.array([0, 8191], np.uint16))
    assert ids.tolist() == [text_size, text_size + 8191]


@pytest.mark.parametrize("codes", [[-1], [0, 8192]])
def test_codes_outside_the_codebook_are_refused(codes: list[int]) -> None:
    with pytest.raises(ShapeError, match="0 to 8191"):
        LWM.vision_ids(np.array(codes))


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ShapeError, match="text_size is 0"):
        Vocabulary(0)
    with pytest.raises(ShapeError, match="need 8194"):
        Vocabulary(10, vision_size=8193)
    assert Vocabulary(10, vision_size=8194).size == 8204
    with pytest.raises(ShapeError):
        Vocabulary(10, vision_size=-1)
