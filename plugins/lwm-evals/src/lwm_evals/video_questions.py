"""The samples of the video needle suite: a pure function of (seed, frames, sample), whatever stage is being evaluated.

Shapes: T frames of a clip, n codes a frame, k frames that show the needle.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lwm_core.errors import DataError, ShapeError
from lwm_core.frames import frame_tokens, vision_tokens
from lwm_core.prompts import TEMPLATES, Order, given_text
from lwm_core.protocols import EvalSetup
from lwm_evals.grid import known_lengths
from lwm_evals.haystacks import Codes, excerpt
from lwm_evals.options import VideoNeedleOptions
from lwm_evals.pictures import QUESTIONS, answers


@dataclass(frozen=True)
class VideoQuestion:
    """One sample: a prompt in ids and the word that is the answer.

    Args:
        sample: its number.
        frames: T.
        depth: where the needle is to lie, in [0, 1].
        place: the clip's frame that shows it first.
        prompt: ids.
        answer: one of the words of ``lwm_evals.pictures.answers``.
    """

    sample: int
    frames: int
    depth: float
    place: int
    prompt: list[int]
    answer: str


class Prompts:
    """What stands around a clip, and how long the whole becomes."""

    def __init__(self, options: VideoNeedleOptions, setup: EvalSetup, codes_per_frame: int) -> None:
        self.options = options
        self._setup = setup
        self._codes_per_frame = codes_per_frame
        self._encode = setup.tokenizer.encode
        self._special = setup.tokenizer.special_ids
        self.words = answers(options.asked)

    def build(self, clip: Sequence[int], frames: int) -> list[int]:
        """``[bos] USER: question, clip, ASSISTANT:`` in the words that LWM's clips are learnt with.

        Each stretch of text is encoded by itself, as training data has it.
        """
        before, after = self._around(frames)
        return [*before, *clip, *after]

    def answers(self) -> list[list[int]]:
        """Ids of every word that may be the answer, with the tokenizer's ``eos`` where an answer ends with it."""
        eos = self._special.get("eos") if self.options.stop_at_eos else None
        end = [] if eos is None else [eos]
        return [[*self._encode(f" {word}"), *end] for word in self.words]

    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        eos = self._special.get("eos") if self.options.stop_at_eos else None
        return () if eos is None else (eos,)

    def length(self, frames: int) -> int:
        """Tokens of the prompt with so many frames, and of the room for the answer."""
        around = sum(map(len, self._around(frames)))
        return around + vision_tokens(frames, self._codes_per_frame) + self.options.max_new_tokens

    def clip_lengths(self) -> dict[int, int]:
        """Length in tokens → frames, shortest first: the clips that are asked about.

        Raises:
            DataError: no length is known, or none has room for a needle.
            ShapeError: a clip that is asked for is shorter than its needle.
        """
        least = self.options.needle_frames
        if self.options.frames is not None:
            short = [frames for frames in self.options.frames if frames < least]
            if short:
                raise ShapeError(
                    f"video-needle: a clip of {short[0]} frames has no room for needle_frames = {least}; use more"
                )
            return {self.length(frames): frames for frames in sorted(set(self.options.frames))}
        lengths = known_lengths(self._setup)
        if not lengths:
            raise DataError("video-needle: the run has no stages and no frames are set; set frames in [[evals]]")
        fits = sorted({frames for length in lengths if (frames := self._most(length)) >= least})
        if not fits:
            need = self.length(least)
            raise DataError(
                f"video-needle: question, {least} frame(s) and answer take {need} tokens, but the longest stage has "
                f"{lengths[-1]}; use a longer one, or set frames in [[evals]]"
            )
        return {self.length(frames): frames for frames in fits}

    def _most(self, length: int) -> int:
        """The most frames that fit ``length`` tokens."""
        two = self.length(2)
        if length < two:  # a picture has words of its own around it
            return int(self.length(1) <= length)
        return 2 + (length - two) // vision_tokens(1, self._codes_per_frame)

    def _around(self, frames: int) -> tuple[list[int], list[int]]:
        order: Order = "image-text" if frames == 1 else "video-text"
        before, after = given_text(order, TEMPLATES[order], question=QUESTIONS[self.options.asked])
        bos = [self._special["bos"]] if "bos" in self._special else []
        return [*bos, *self._encode(before)], list(self._encode(after))


class VideoQuestions:
    """Makes the samples of one run out of codes."""

    def __init__(self, options: VideoNeedleOptions, setup: EvalSetup, codes: Codes, prompts: Prompts) -> None:
        self._options, self._setup, self._codes, self._prompts = options, setup, codes, prompts
        self._by_answer = {
            word: [i for i, answer in enumerate(codes.answers) if answer == word] for word in prompts.words
        }

    def question(self, frames: int, sample: int) -> VideoQuestion:
        """The sample ``sample`` of clips of ``frames`` frames.

        Depths go round; of as many samples as there are answers each is right once, so that who always gives the same
        is right as often as who guesses.
        """
        options, words = self._options, self._prompts.words
        turn, place = divmod(sample, len(words))
        answer = words[int(np.random.default_rng([self._setup.seed, frames, turn]).permutation(len(words))[place])]
        random = np.random.default_rng([self._setup.seed, frames, sample, 1])
        depth = options.depth_list[sample % len(options.depth_list)]
        shown = self._codes.pictures[int(random.choice(self._by_answer[answer]))]
        around = frames - options.needle_frames
        hay = excerpt(self._codes.haystack, int(random.integers(len(self._codes.haystack))), around)
        at = round(depth * around)
        clip = np.concatenate([hay[:at], np.repeat(shown[None], options.needle_frames, axis=0), hay[at:]])
        tokens = frame_tokens(clip, self._setup.vocabulary).tolist()
        return VideoQuestion(sample, frames, depth, at, self._prompts.build(tokens, frames), answer)

    def fingerprint(self) -> str:
        """12 hex digits of all that decides on the questions and on how answers are taken."""
        o = self._options
        around = self._prompts.build([], 2), self._prompts.build([], 1)
        said = (self._setup.seed, o.depth_list, o.needle_frames, o.choose, o.max_new_tokens, o.stop_at_eos, around,
                self._prompts.answers(), self._codes.fingerprint)  # fmt: skip
        return hashlib.sha256(repr(said).encode()).hexdigest()[:12]


def said_first(words: Sequence[str], response: str) -> str | None:
    """Of ``words`` the one that a response names first, as a word of its own, in capitals or not."""
    found = re.search(rf"\b(?:{'|'.join(map(re.escape, words))})\b", response, re.IGNORECASE)
    return None if found is None else found[0].lower()
