"""Source ``vision``: clips of a folder of codes with their captions, in LWM's orders (arXiv 2402.08268, section 4).

Shapes: E examples, F forms, Q questions; T frames of n codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lwm_core.batch import TokenSequence
from lwm_core.errors import DataError, LwmError, ShapeError
from lwm_core.frames import frame_tokens, uniform_frames, vision_tokens
from lwm_core.prompts import TEMPLATES, UNCONDITIONAL, Order, Stretch, lay_out
from lwm_core.protocols import Tokenizer
from lwm_core.shards import Shards
from lwm_core.vocab import Vocabulary
from lwm_data.clips import ClipExample
from lwm_data.options import VisionOptions
from lwm_data.sources.base import Item, Key, example, plan_whole

FORMS = ("text-vision", "vision-text", "text", "vision", "unconditional")
"""What is made of an example: one of the orders, or a clip whose text was left out."""


class ClipCorpus:
    """The examples of a vision source, and how many tokens each has besides its frames."""

    def __init__(
        self,
        name: str,
        options: VisionOptions,
        shards: Shards,
        examples: Sequence[ClipExample],
        tokenizer: Tokenizer,
        vocabulary: Vocabulary,
    ) -> None:
        self.name, self.options, self.examples = name, options, list(examples)
        self._shards, self._vocabulary = shards, vocabulary
        self._tokenizer = tokenizer
        self._bos, self._eos = (
            [tokenizer.special_ids[role]] if role in tokenizer.special_ids else [] for role in ("bos", "eos")
        )
        self.forms = _forms(options)
        self.codes_per_frame = shards.manifest.tokens_per_frame
        # [E, F, Q], once and not by stage: encoding all texts is what takes time.
        questions = range(len(options.questions))
        self.text_tokens = np.array(
            [[[self._count(e, form, q) for q in questions] for form in self.forms] for e in range(len(examples))],
            np.int64,
        )

    def frames(self, number: int) -> int:
        """Frames of an example before a row's length is looked at."""
        frames = self.examples[number].frames
        return frames if self.options.max_frames is None else min(frames, self.options.max_frames)

    def sequence(self, number: int, form: str, question: int, frames: int, first: int = 0) -> TokenSequence:
        """The tokens of an example in one form, with so many of its frames; ``first`` is that of consecutive ones.

        Raises:
            DataError: its codes cannot be read, or are none of the model's.
        """
        ids: list[NDArray[np.int32]] = [np.asarray(self._bos, np.int32)]
        learnt = [False] * len(self._bos)
        for stretch in self._stretches(number, form, question):
            part = self._clip(number, frames, first) if stretch.text is None else self._tokenizer.encode(stretch.text)
            ids.append(np.asarray(part, np.int32))
            learnt += [stretch.learnt] * len(part)
        ids.append(np.asarray(self._eos, np.int32))
        learnt += [True] * len(self._eos)
        return example(np.concatenate(ids), np.array(learnt), self.options.share)

    def _stretches(self, number: int, form: str, question: int) -> tuple[Stretch, ...]:
        one = self.examples[number]
        if form == "unconditional":
            return lay_out("video", UNCONDITIONAL)
        # By the cap and not by the row: a video stays one where a short row holds a single frame of it.
        order = _order(form, "image" if self.frames(number) == 1 else "video")
        template = self.options.templates.get(order, TEMPLATES[order])
        return lay_out(order, template, one.text, one.question or self.options.questions[question])

    def _count(self, number: int, form: str, question: int) -> int:
        stretches = self._stretches(number, form, question)
        texts = sum(len(self._tokenizer.encode(stretch.text)) for stretch in stretches if stretch.text is not None)
        return len(self._bos) + texts + len(self._eos)

    def _clip(self, number: int, frames: int, first: int) -> NDArray[np.int32]:
        one = self.examples[number]
        try:
            if frames == one.frames or self.options.sampling == "consecutive":
                codes = self._shards.codes(one.video, first, first + frames)
            else:  # frame by frame: a long video is not read whole for a few frames of it
                at = uniform_frames(one.frames, frames).tolist()
                codes = np.concatenate([self._shards.codes(one.video, i, i + 1) for i in at])
            return frame_tokens(codes, self._vocabulary)
        except LwmError as error:
            raise DataError(f"vision source {self.name!r}: {one.name}: {error}") from None


class VisionSource:
    """Whole clips, packed. An item is (number of the example, of its form, of its question, frames, the first)."""

    def __init__(self, corpus: ClipCorpus, seq_len: int) -> None:
        """Raises ShapeError where an example is longer than a row, unless such are left out."""
        self._corpus, self._seq_len = corpus, seq_len
        self._forms, options = corpus.forms, corpus.options
        with_clip = np.array([form != "text" for form in self._forms])[:, None]
        wanted = np.array([corpus.frames(number) for number in range(len(corpus.examples))])[:, None, None]
        least = np.where(with_clip, 1 if options.max_frames is None else wanted, 0)
        need = corpus.text_tokens + vision_tokens(least, corpus.codes_per_frame)
        longest = need.max(axis=(1, 2))
        self._numbers = np.flatnonzero(longest <= seq_len)
        if len(self._numbers) < len(longest) and "too-long" not in options.leave_out:
            self._refuse(int(np.argmax(longest)), int(longest.max()))
        if not len(self._numbers):
            raise ShapeError(f"vision source {corpus.name!r}: none of its examples fits a row of {seq_len} tokens")
        held = (seq_len - corpus.text_tokens) // vision_tokens(1, corpus.codes_per_frame)
        self._frames = np.where(with_clip, np.minimum(held, wanted), 0)

    def plan(self, rows: int, key: Key) -> list[list[Item]]:
        """See :class:`~lwm_data.sources.base.Source`."""
        return plan_whole(rows, self._seq_len, len(self._numbers), key, self._draw)

    def build(self, item: Item, key: Key) -> TokenSequence:
        """See :class:`~lwm_data.sources.base.Source`; all that is random was drawn in the plan."""
        number, form, question, frames, first = (int(value) for value in item)
        return self._corpus.sequence(number, self._forms[form], question, frames, first)

    def _draw(self, random: np.random.Generator, place: int) -> tuple[Item, int]:
        corpus, options = self._corpus, self._corpus.options
        swap, drop = (random.random() < chance for chance in (options.swap, options.drop))
        name: str = options.order
        if swap:
            name = "vision-text" if name == "text-vision" else "text-vision"
        if drop and name == "text-vision":
            name = "unconditional"
        number, form = int(self._numbers[place]), self._forms.index(name)
        question = int(random.integers(len(options.questions)))
        frames = int(self._frames[number, form, question])
        length = corpus.text_tokens[number, form, question] + vision_tokens(frames, corpus.codes_per_frame)
        first = 0
        if options.sampling == "consecutive" and frames:
            first = int(random.integers(corpus.examples[number].frames - frames + 1))
        return (number, form, question, frames, first), int(length)

    def _refuse(self, number: int, need: int) -> None:
        corpus = self._corpus
        one = corpus.examples[number]
        if corpus.options.max_frames is None:
            what, remedy = "the text and one frame", "use a longer seq_len"
        else:
            what, remedy = f"the text and {corpus.frames(number)} frame(s)", "use a longer seq_len, a lower max_frames"
        raise ShapeError(
            f"vision source {corpus.name!r}: {what} of {one.name!r} need {need} tokens, but the stage's rows have "
            f"{self._seq_len}; {remedy}, or set leave_out = ['too-long']"
        )


def _forms(options: VisionOptions) -> tuple[str, ...]:
    """The forms that a draw may give."""
    forms = {options.order} if options.swap < 1 else set()
    if options.swap:
        forms.add("vision-text" if options.order == "text-vision" else "text-vision")
    if options.drop and "text-vision" in forms:
        forms.add("unconditional")
        if options.drop == 1:
            forms.remove("text-vision")
    return tuple(form for form in FORMS if form in forms)


def _order(form: str, clip: str) -> Order:
    """The order's own name: ``text-vision`` of a picture is ``text-image``; one part alone is ``text`` or ``video``."""
    if form == "vision":
        return "video"
    order: Order = form.replace("vision", clip)  # type: ignore[assignment]
    return order
