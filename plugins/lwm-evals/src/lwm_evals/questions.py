"""The samples of the needle suite: a pure function of (seed, length, sample), whatever stage is being evaluated."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lwm_core import needles
from lwm_core.errors import DataError
from lwm_core.protocols import EvalContext, Tokenizer
from lwm_evals.options import NeedleOptions


@dataclass(frozen=True)
class Question:
    """One sample: a prompt in ids and the numbers that the answer must hold."""

    sample: int
    length: int
    depth: float
    prompt: list[int]
    numbers: tuple[str, ...]


class Questions:
    """Makes the samples of one run.

    Raises:
        DataError: there is no text to hide needles in, or the held-out split has fewer cities than needles.
    """

    def __init__(self, options: NeedleOptions, context: EvalContext) -> None:
        self._options = options
        self._seed = context.seed
        self._tokenizer: Tokenizer = context.tokenizer
        self._bos = context.tokenizer.special_ids.get("bos")
        self._ends = needles.sentence_ends(context.tokenizer.decode, context.tokenizer.size)
        self._haystack = _haystack_ids(options, context)

    def question(self, length: int, sample: int) -> Question:
        """The sample ``sample`` of ``length``; prompt and answer together take exactly ``length`` tokens.

        The first needle, which is always asked for, lies at the sample's depth (samples go round the depths); further
        needles lie anywhere.

        Raises:
            ShapeError: needles, question and answer alone are longer than ``length``.
        """
        options = self._options
        random = np.random.default_rng([self._seed, length, sample])
        depth = options.depth_list[sample % len(options.depth_list)]
        hidden = needles.draw_needles(random, options.needles, "held-out")
        places = [depth, *(float(place) for place in random.random(options.needles - 1))]
        asked = hidden[: options.retrieve]
        encode = self._tokenizer.encode
        room = needles.fit_haystack(length - options.new_tokens, hidden, asked, encode, self._bos)
        prompt = needles.build_prompt(
            self._excerpt(random, room), list(zip(places, hidden, strict=True)), asked, encode, self._ends, self._bos
        )
        return Question(sample, length, depth, prompt, tuple(needle.number for needle in asked))

    def fingerprint(self) -> str:
        """12 hex digits of all that decides on the questions and on how answers are cut."""
        o = self._options
        said = repr((self._seed, o.depth_list, o.needles, o.retrieve, o.new_tokens, o.stop_at_eos, self._bos))
        return hashlib.sha256(said.encode() + self._haystack.tobytes()).hexdigest()[:12]

    def _excerpt(self, random: np.random.Generator, count: int) -> list[int]:
        """``count`` ids of the text from anywhere on, from its start again where it ends."""
        start = int(random.integers(len(self._haystack)))
        return [int(i) for i in np.take(self._haystack, np.arange(start, start + count), mode="wrap")]


def _haystack_ids(options: NeedleOptions, context: EvalContext) -> NDArray[np.int32]:
    if options.haystack is not None:
        texts: Sequence[str] = [_read_text(context.base_dir / options.haystack)]
        source = options.haystack
    else:
        texts = context.held_out()
        source = "the held-out text"
        if not texts:
            raise DataError(
                "needle: the data source holds no text out and no haystack is given; "
                "hold some text out in [data], or set haystack to a text file in [[evals]]"
            )
    ids = np.asarray([i for text in texts for i in context.tokenizer.encode(text.rstrip("\n") + "\n")], dtype=np.int32)
    if not any(text.strip() for text in texts):
        raise DataError(f"needle: {source} is empty; expected some text to hide needles in")
    return ids


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"needle: haystack {path} cannot be read: {reason}; expected a UTF-8 text file") from error
