"""The drawings: each is what its name says, by geometry done here anew, and the background gives no answer away."""

from __future__ import annotations

import colorsys
from itertools import combinations

import numpy as np
import pytest

from lwm_evals.pictures import COLOURS, DIGITS, SCENE, SHAPES, answers, background, paint, pictures, shape_mask

AREAS = {
    "circle": np.pi * 0.75**2,
    "square": 1.32**2,
    "triangle": 0.55 * 1.44**2,
    "diamond": 2 * 0.85**2,
    "cross": 2 * 0.48 * 1.56 - 0.48**2,
    "ring": np.pi * (0.78**2 - 0.38**2),
    "star": 5 * 0.88 * 0.36 * np.sin(np.pi / 5),  # ten triangles between two radii
}


@pytest.mark.parametrize("shape", AREAS)
def test_a_shape_has_its_area(shape: str) -> None:
    """The picture's square is 2 × 2, so its mean is the area over four."""
    assert shape_mask(shape, 128).mean() * 4 == pytest.approx(AREAS[shape], rel=0.01)


def test_a_moon_is_a_disc_less_another() -> None:
    mask = shape_mask("moon", 128)
    assert mask[64, 8] < 1e-9 and mask[64, 20] == 1 and mask[64, 90] == 0  # rim, body, what is taken away
    assert np.allclose(mask, mask[::-1])


@pytest.mark.parametrize("asked", ["colour", "shape", "digit"])
def test_every_answer_is_shown_as_often_and_every_picture_is_another(asked: str) -> None:
    told, frames = pictures(asked, 32)  # type: ignore[arg-type]
    words = answers(asked)  # type: ignore[arg-type]
    assert frames.dtype == np.uint8 and frames.shape == (len(told), 32, 32, 3)
    assert {told.count(word) for word in words} == {len(told) // len(words)} and set(told) == set(words)
    assert len({frame.tobytes() for frame in frames}) == len(frames)


def test_pictures_of_two_answers_differ_in_many_pixels() -> None:
    for names, masks in (("shape", SHAPES), ("digit", DIGITS)):
        told, frames = pictures(names, 32)  # type: ignore[arg-type]
        white = [frame for frame in frames if (frame == 250).all(axis=-1).any()]
        assert len(white) == len(masks)
        for one, other in combinations(white, 2):
            assert ((one != other).any(axis=-1)).mean() > 0.03, told


def test_a_colour_is_painted_where_the_mask_is() -> None:
    mask = np.array([[0.0, 1.0], [0.5, 0.0]])
    assert paint(mask, "white").tolist() == [[[20] * 3, [250] * 3], [[135] * 3, [20] * 3]]


def test_the_background_moves_is_cut_and_has_little_colour() -> None:
    frames = background(np.random.default_rng(3), 4 * SCENE + 2, 32)
    assert frames.shape == (4 * SCENE + 2, 32, 32, 3)
    steps = np.abs(np.diff(frames.astype(float), axis=0)).mean(axis=(1, 2, 3))
    assert (steps > 1).all()
    cuts = [SCENE - 1, 2 * SCENE - 1, 3 * SCENE - 1, 4 * SCENE - 1]
    assert (steps[cuts] > np.delete(steps, cuts).mean()).all()
    saturation = [colorsys.rgb_to_hsv(*(pixel / 255))[1] for pixel in frames[::7, ::9, ::9].reshape(-1, 3)]
    vivid = [colorsys.rgb_to_hsv(*(np.array(c) / 255))[1] for name, c in COLOURS.items() if name != "white"]
    assert max(saturation) < 0.2 < 0.4 < min(vivid)
    assert frames.max() < 240, "no frame is as bright as white, nor so dark as what pictures stand on"
    assert frames.min() > 40
    again = background(np.random.default_rng(3), 4 * SCENE + 2, 32)
    assert (frames == again).all()
