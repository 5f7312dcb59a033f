"""Clips of codes by a generator that notes what it is asked: prompts, delimiters, settings, seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lwm_core.builtins.byte_tokens import BytesTokenizer
from lwm_core.errors import LwmError, ShapeError
from lwm_core.frames import frame_codes
from lwm_core.protocols import SamplingSpec
from lwm_core.run.vision import FIRST, LATER, ClipWriter, needs_guidance, vision_block, vision_prompt, write_clip
from lwm_core.vocab import Vocabulary

BYTES = BytesTokenizer()
BOS = BYTES.special_ids["bos"]
VOCABULARY = Vocabulary(259, 20, 16)
EOF, EOV = 259 + 16, 259 + 17


class Painter:
    """Sessions whose tokens depend on the seed and on how many came before; ``wrong`` stands in a frame's place 2."""

    def __init__(self, wrong: int | None = None, short: int = 0) -> None:
        self.wrong, self.short = wrong, short
        self.guided: list[bool] = []
        self.asked: list[SamplingSpec] = []
        self.reads: list[Any] = []
        self.tokens: list[int] = []
        self.closed = False

    def session(self, *, guided: bool = False) -> Painter:
        self.guided.append(guided)
        return self

    def read(self, tokens: Sequence[int], unconditional: Sequence[int] | None = None, *, expected: int = 0) -> None:
        self.reads.append((list(tokens), None if unconditional is None else list(unconditional), expected))
        self.tokens += tokens

    def stream(self, sampling: SamplingSpec) -> Iterator[int]:
        self.asked.append(sampling)
        first, stop = sampling.ids or (0, 0)
        for place in range(sampling.max_new_tokens - self.short):
            token = first + (sampling.seed + len(self.tokens)) % (stop - first)
            token = self.wrong if self.wrong is not None and place == 2 else token
            self.tokens.append(token)
            yield token

    def unguide(self) -> None:
        self.guided.append(False)

    def close(self) -> None:
        self.closed = True


def test_the_words_are_lwms() -> None:
    """Its ``vision_generation``: ``<s>`` and the text; without the condition ``<s><vision>``."""
    for kind, words in (("image", "an image"), ("video", "a video")):
        prompt = vision_prompt(kind, "a {red} boat", BYTES)  # type: ignore[arg-type]
        text = f"You are a helpful assistant. USER: Generate {words} of a {{red}} boat ASSISTANT: <vision>"
        assert prompt.conditional == (BOS, *text.encode())
        assert prompt.unconditional == (BOS, *b"<vision>")
    block = vision_block(np.array([[0, 1], [2, 15]]), VOCABULARY, BYTES)
    assert block == [*b"<vision>", 259, 260, EOF, 261, 274, EOV, *b"</vision>"]


def test_every_fifth_token_is_a_delimiter_and_the_rest_are_asked_for() -> None:
    """Frames of 4 codes: the prompt is read once, then one delimiter a frame, and eov at the end."""
    painter = Painter()
    writer = ClipWriter(painter, VOCABULARY, 4)  # type: ignore[arg-type]
    prompt = vision_prompt("video", "a boat", BYTES)
    writer.begin(prompt, guided=True, frames=3)
    counted: list[int] = []
    frames = [*writer.write(1, FIRST, lambda: counted.append(1)), *writer.write(2, LATER)]
    tokens = writer.end()
    assert painter.guided == [True] and len(counted) == 4
    assert painter.reads == [
        (list(prompt.conditional), list(prompt.unconditional), 15), ([EOF], None, 0), ([EOF], None, 0),
        ([EOV], None, 0),
    ]  # fmt: skip
    clip = tokens[len(prompt.conditional) :]
    assert [clip[at] for at in (4, 9, 14)] == [EOF, EOF, EOV] and len(clip) == 15
    assert np.array_equal(frame_codes(np.array(clip), VOCABULARY, 4), np.stack(frames))
    assert np.array_equal(writer.codes, np.stack(frames)) and writer.codes.dtype == np.int32
    seeds = [one.seed for one in painter.asked]
    assert len(set(seeds)) == 3 and all(0 <= seed < 2**31 for seed in seeds)
    told = {"max_new_tokens": 4, "modality": "vision", "ids": (259, 275)}
    for asked, given, seed in zip(painter.asked, (FIRST, LATER, LATER), seeds, strict=True):
        assert asked == replace(given, seed=seed, **told)


def test_lwms_settings() -> None:
    """``run_sample_image.sh`` and ``run_sample_video.sh``."""
    assert (FIRST.guidance, FIRST.top_k, FIRST.temperature, FIRST.top_p) == (5.0, 8192, 1.0, 1.0)
    assert (LATER.guidance, LATER.top_k, LATER.temperature, LATER.top_p) == (1.0, 1000, 1.0, 1.0)


def test_a_clip_in_one_call_is_that_of_several() -> None:
    for frames in (1, 4):
        first, later = replace(FIRST, seed=7), replace(LATER, seed=3)
        codes = write_clip(Painter(), BYTES, VOCABULARY, 4, "x", frames, first=first, later=later)  # type: ignore[arg-type]
        writer = ClipWriter(Painter(), VOCABULARY, 4)  # type: ignore[arg-type]
        writer.begin(vision_prompt("image" if frames == 1 else "video", "x", BYTES), guided=True, frames=frames)
        steps = [*writer.write(1, first)]
        for _ in range(frames - 1):
            steps += writer.write(1, replace(later, seed=7))
        assert np.array_equal(codes, np.stack(steps)) and codes.shape == (frames, 4)


def test_seeds_beside_each_other_share_no_frame() -> None:
    painter = Painter()
    for seed in (0, 1, 2, -1):
        write_clip(painter, BYTES, VOCABULARY, 2, "x", 3, first=replace(FIRST, seed=seed))  # type: ignore[arg-type]
    assert len({one.seed for one in painter.asked}) == 12


@pytest.mark.parametrize(
    ("first", "later", "frames", "guided"),
    [(5.0, 1.0, 3, True), (1.0, 1.0, 3, False), (1.0, 2.0, 3, True), (1.0, 2.0, 1, False), (0.0, 1.0, 1, True)],
)
def test_a_second_row_is_there_where_it_is_needed_alone(first: float, later: float, frames: int, guided: bool) -> None:
    painter = Painter()
    samplings = replace(FIRST, guidance=first), replace(LATER, guidance=later)
    write_clip(painter, BYTES, VOCABULARY, 4, "x", frames, first=samplings[0], later=samplings[1])  # type: ignore[arg-type]
    assert painter.guided == [guided] + [False] * (later == 1.0 and frames > 1) and painter.closed
    assert (painter.reads[0][1] is not None) == guided
    assert needs_guidance(*samplings[:frames]) == guided


def test_a_smaller_codebook_is_drawn_from() -> None:
    painter = Painter()
    codes = write_clip(painter, BYTES, VOCABULARY, 9, "x", codes=8)  # type: ignore[arg-type]
    assert painter.asked[0].ids == (259, 267) and codes.max() == 7
    for wrong in (17, 0):
        with pytest.raises(ShapeError, match=f"codes of {wrong}: the model has ids for 16"):
            ClipWriter(painter, VOCABULARY, 4, wrong)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="has ids for 0"):
        ClipWriter(painter, Vocabulary(259), 4)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="0 frames"):
        write_clip(painter, BYTES, VOCABULARY, 4, "x", 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [EOF, EOV, 258, 278])
def test_a_generator_that_gives_no_code_is_told_of(wrong: int) -> None:
    with pytest.raises(LwmError, match=r"gave 4 tokens for a frame, codes .* expected 4 from 0 to 15"):
        write_clip(Painter(wrong), BYTES, VOCABULARY, 4, "x")  # type: ignore[arg-type]
    with pytest.raises(LwmError, match="gave 3 tokens for a frame"):
        write_clip(Painter(short=1), BYTES, VOCABULARY, 4, "x")  # type: ignore[arg-type]


def test_a_clip_without_a_frame_has_no_end() -> None:
    writer = ClipWriter(Painter(), VOCABULARY, 4)  # type: ignore[arg-type]
    writer.begin(vision_prompt("video", "x", BYTES), guided=False)
    with pytest.raises(LwmError, match="no frame yet"):
        writer.end()
    assert writer.codes.shape == (0, 4)


def test_a_clip_goes_on_after_frames_that_are_given() -> None:
    """The given frames stand in the prompt, the delimiter of the last is read before the first that is written."""
    painter = Painter()
    writer = ClipWriter(painter, VOCABULARY, 4)  # type: ignore[arg-type]
    prompt = vision_prompt("video", "a boat", BYTES)
    given = np.array([[0, 1, 2, 3], [15, 14, 13, 12]])
    writer.begin(prompt, guided=True, frames=2, given=given)
    made = np.stack(list(writer.write(2, LATER)))
    ids = [259, 260, 261, 262, EOF, 274, 273, 272, 271]
    assert painter.reads == [
        ([*prompt.conditional, *ids], [*prompt.unconditional, *ids], 10), ([EOF], None, 0), ([EOF], None, 0)
    ]  # fmt: skip
    assert np.array_equal(writer.codes, np.concatenate([given, made]))
    for wrong in (given[:, :3], given + 1, given - 1, given[0]):
        with pytest.raises(ShapeError, match=r"expected \[T, 4\] of codes below 16"):
            writer.begin(prompt, guided=False, given=wrong)
