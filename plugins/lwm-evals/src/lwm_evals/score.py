"""How well a model predicts a long text, read in one context: log-likelihoods by position in it.

Shapes: N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, log

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Band:
    """The targets at positions ``[start, stop)``, from 1 since the first token is not predicted.

    Args:
        start, stop: positions.
        nats: mean negative log-likelihood of a token.
    """

    start: int
    stop: int
    nats: float

    @property
    def perplexity(self) -> float:
        """Of these tokens; infinite where one of them was held impossible."""
        return _exp(self.nats)


@dataclass(frozen=True)
class Score:
    """A text's score.

    Args:
        tokens: of the text, the first among them.
        nats: mean negative log-likelihood of the predicted tokens.
        bits_per_byte: of the text's UTF-8 bytes, so that tokenizers compare.
        bands: by position.
    """

    tokens: int
    nats: float
    bits_per_byte: float
    bands: tuple[Band, ...]

    @property
    def perplexity(self) -> float:
        """Of all predicted tokens."""
        return _exp(self.nats)


def _exp(nats: float) -> float:
    return exp(nats) if nats < 700 else float("inf")


def edges(tokens: int, first: int = 64) -> list[int]:
    """Where the bands of ``tokens`` begin and the last one ends: each is as long as all before it, from ``first``."""
    if tokens < 2:
        raise ValueError(f"{tokens} tokens have no position to predict")
    found = [1]
    while found[-1] < tokens:
        found.append(min(tokens, max(first, 2 * found[-1])))
    if len(found) > 2 and 2 * (found[-1] - found[-2]) < found[-2] - found[-3]:
        del found[-2]  # a rest too short to mean much belongs to the band before it
    return found


def score(log_likelihoods: NDArray[np.float32], text_bytes: int) -> Score:
    """The score of ``log_likelihoods [N-1]``, natural logarithms, of a text of ``text_bytes`` bytes."""
    nats = -log_likelihoods.astype(np.float64)
    cuts = edges(len(nats) + 1)
    bands = tuple(Band(start, stop, float(nats[start - 1 : stop - 1].mean())) for start, stop in pairwise(cuts))
    return Score(len(nats) + 1, float(nats.mean()), float(nats.sum()) / log(2) / max(1, text_bytes), bands)


def table(found: Score) -> Sequence[tuple[str, str, str]]:
    """Positions, perplexity and a bar for each band; the longest bar is the highest perplexity."""
    top = max((band.nats for band in found.bands if np.isfinite(band.nats)), default=0.0)
    rows = []
    for band in found.bands:
        share = band.nats / top if top > 0 and np.isfinite(band.nats) else 1.0
        rows.append((f"{band.start:,}-{band.stop - 1:,}", f"{band.perplexity:.2f}", "█" * round(32 * share)))
    return rows
