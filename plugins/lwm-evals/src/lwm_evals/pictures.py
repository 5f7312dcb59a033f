"""Pictures and a moving background that are drawn and not downloaded, with what is asked about them.

Shapes: T frames [T,H,W,3] uint8, H = W = side pixels; a mask is [H,W], its points x to the right and y down in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Asked = Literal["colour", "shape", "digit"]
"""What of a picture is asked for."""

QUESTIONS: Mapping[Asked, str] = MappingProxyType(
    {
        "colour": "What colour is the shape in the video?",
        "shape": "Which shape is in the video?",
        "digit": "Which digit is in the video?",
    }
)

COLOURS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "red": (215, 30, 35), "orange": (255, 140, 0), "yellow": (250, 225, 25), "green": (20, 150, 50),
        "blue": (25, 70, 225), "purple": (125, 30, 160), "pink": (255, 135, 195), "white": (250, 250, 250),
    }
)  # fmt: skip

GROUND = (20, 20, 20)
"""What a picture is drawn on; no frame of the background is so dark."""

Points = NDArray[np.float64]
Inside = Callable[[Points, Points], NDArray[np.bool_]]


def _star(x: Points, y: Points) -> NDArray[np.bool_]:
    fifth, tip, notch = np.pi / 5, 0.88, 0.36
    turn = np.abs((np.arctan2(x, -y) + fifth) % (2 * fifth) - fifth)  # angle from the nearest tip
    edge = tip * notch * np.sin(fifth) / (tip * np.sin(turn) + notch * np.sin(fifth - turn))
    return np.asarray(np.hypot(x, y) < edge)


SHAPES: Mapping[str, Inside] = MappingProxyType(
    {
        "circle": lambda x, y: np.hypot(x, y) < 0.75,
        "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) < 0.66,
        "triangle": lambda x, y: (y < 0.62) & (np.abs(x) < 0.55 * (y + 0.82)),
        "diamond": lambda x, y: np.abs(x) + np.abs(y) < 0.85,
        "cross": lambda x, y: (np.minimum(np.abs(x), np.abs(y)) < 0.24) & (np.maximum(np.abs(x), np.abs(y)) < 0.78),
        "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.58) < 0.2,
        "star": _star,
        "moon": lambda x, y: (np.hypot(x, y) < 0.78) & (np.hypot(x - 0.42, y) > 0.62),
    }
)

DIGITS = MappingProxyType(
    {
        "0": "01110 10001 10011 10101 11001 10001 01110", "1": "00100 01100 00100 00100 00100 00100 01110",
        "2": "01110 10001 00001 00110 01000 10000 11111", "3": "11111 00010 00100 00010 00001 10001 01110",
        "4": "00010 00110 01010 10010 11111 00010 00010", "5": "11111 10000 11110 00001 00001 10001 01110",
        "6": "00110 01000 10000 11110 10001 10001 01110", "7": "11111 00001 00010 00100 01000 01000 01000",
        "8": "01110 10001 10001 01110 10001 10001 01110", "9": "01110 10001 10001 01111 00001 00010 01100",
    }
)  # fmt: skip
"""Seven rows of five dots."""

SCENE = 16
"""Frames of the background between two cuts."""

_FINER = 3  # points a pixel and direction, so that edges are smooth


def answers(asked: Asked) -> tuple[str, ...]:
    """The words that an answer may be; a guess is right once in as many."""
    return tuple({"colour": COLOURS, "shape": SHAPES, "digit": DIGITS}[asked])


def pictures(asked: Asked, side: int) -> tuple[tuple[str, ...], NDArray[np.uint8]]:
    """Every picture that may be shown: the answer of each, and the frames [T,H,W,3].

    Shapes come in all colours, whichever of the two is asked for, and digits too, so that nothing else gives an answer
    away.
    """
    masks = {name: shape_mask(name, side) for name in SHAPES} if asked != "digit" else {
        name: digit_mask(name, side) for name in DIGITS
    }  # fmt: skip
    made = [(colour if asked == "colour" else name, colour, name) for name in masks for colour in COLOURS]
    return tuple(answer for answer, _, _ in made), np.stack([paint(masks[name], c) for _, c, name in made])


def shape_mask(shape: str, side: int) -> Points:
    """``[H,W]``: how much of each pixel a shape covers."""
    at = (np.arange(side * _FINER) + 0.5) / (side * _FINER) * 2 - 1
    inside = SHAPES[shape](at[None, :], at[:, None]).astype(np.float64)
    return np.asarray(inside.reshape(side, _FINER, side, _FINER).mean(axis=(1, 3)))


def digit_mask(digit: str, side: int) -> Points:
    """``[H,W]``: where a digit's dots are, upright in the middle."""
    dots = np.array([[int(dot) for dot in row] for row in DIGITS[digit].split()], np.float64)
    rows, columns = dots.shape
    at = (np.arange(side) + 0.5) / side * (rows + 2) - 1  # a dot's width free above and below
    y, x = np.floor(at).astype(int), np.floor(at - (rows - columns) / 2).astype(int)
    seen = ((y >= 0) & (y < rows))[:, None] & ((x >= 0) & (x < columns))[None, :]
    return np.where(seen, dots[np.clip(y, 0, rows - 1)][:, np.clip(x, 0, columns - 1)], 0.0)


def paint(mask: Points, colour: str) -> NDArray[np.uint8]:
    """``[H,W,3]``: a mask in a colour on :data:`GROUND`."""
    ground, over = np.array(GROUND, np.float64), np.array(COLOURS[colour], np.float64)
    return np.round(ground + mask[..., None] * (over - ground)).astype(np.uint8)


def background(random: np.random.Generator, frames: int, side: int) -> NDArray[np.uint8]:
    """``[T,H,W,3]``: scenes of :data:`SCENE` frames, each of two gratings that drift, in greys with little colour."""
    at = np.linspace(-np.pi, np.pi, side, endpoint=False)
    made = np.empty((frames, side, side, 3), np.uint8)
    for start in range(0, frames, SCENE):
        count = min(SCENE, frames - start)
        tint = 1 + 0.08 * random.uniform(-1, 1, 3)
        light = np.zeros((count, side, side))
        for _ in range(2):
            angle, cycles, phase = random.uniform(0, np.pi), random.uniform(1, 4), random.uniform(0, 2 * np.pi)
            drift = random.uniform(0.2, 0.6) * random.choice([-1.0, 1.0]) * np.arange(count)
            wave = cycles * (np.cos(angle) * at[None, :] + np.sin(angle) * at[:, None]) + phase
            light += np.sin(wave + drift[:, None, None])
        made[start : start + count] = np.round((130 + 32 * light)[..., None] * tint).astype(np.uint8)
    return made
