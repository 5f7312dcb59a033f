"""Pictures and video that a model writes, and those that it is shown: LWM's prompts, and frame after frame of codes.

The words are LWM's (its ``vision_generation`` and ``vision_chat``). ``<vision>`` and ``</vision>`` are text, not ids of
their own. Every (n+1)-th token of a clip is a delimiter that the model is not asked for; all others are drawn from the
codes alone.

Shapes: T frames of n codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from lwm_core.errors import LwmError, ShapeError
from lwm_core.frames import VISION_END, VISION_START, frame_tokens
from lwm_core.prompts import TEMPLATES, UNCONDITIONAL, Order, given_text
from lwm_core.protocols import Generator, SamplingSpec, Tokenizer
from lwm_core.vocab import Vocabulary

FIRST = SamplingSpec(temperature=1.0, top_k=8192, guidance=5.0)
"""How LWM draws a picture, and the first frame of a video."""

LATER = SamplingSpec(temperature=1.0, top_k=1000)
"""How LWM draws the other frames."""


@dataclass(frozen=True)
class VisionPrompt:
    """What a clip is written after.

    Args:
        conditional: ids of what is asked for.
        unconditional: ids of the same without it, for guidance.
    """

    conditional: tuple[int, ...]
    unconditional: tuple[int, ...]


def vision_prompt(kind: Literal["image", "video"], text: str, tokenizer: Tokenizer) -> VisionPrompt:
    """LWM's prompt for an image or a video of ``text``."""
    order: Order = "text-image" if kind == "image" else "text-video"
    bos = [tokenizer.special_ids["bos"]] if "bos" in tokenizer.special_ids else []
    [asked], [nothing] = given_text(order, TEMPLATES[order], text), given_text("video", UNCONDITIONAL)
    return VisionPrompt((*bos, *tokenizer.encode(asked)), (*bos, *tokenizer.encode(nothing)))


def vision_block(codes: NDArray[np.integer], vocabulary: Vocabulary, tokenizer: Tokenizer) -> list[int]:
    """Ids of a clip of codes ``[T,n]`` that a model is shown, between its tags."""
    return [*tokenizer.encode(VISION_START), *frame_tokens(codes, vocabulary).tolist(), *tokenizer.encode(VISION_END)]


class ClipWriter:
    """One clip, frame after frame in one session: nothing is read twice, and each call may draw in its own way.

    Args:
        generator: of the model that writes.
        vocabulary: its.
        codes_per_frame: n.
        codes: entries of the codebook that frames are decoded with; as many as the vocabulary has if none.

    Raises:
        ShapeError: the model has no ids for so many codes.
    """

    def __init__(
        self, generator: Generator, vocabulary: Vocabulary, codes_per_frame: int, codes: int | None = None
    ) -> None:
        has = vocabulary.vision_codes if vocabulary.vision_size else 0
        self._count = has if codes is None else codes
        if not 0 < self._count <= has or codes_per_frame < 1:
            raise ShapeError(
                f"frames of {codes_per_frame} codes of {self._count}: the model has ids for {has}; expected at least 1 "
                "code a frame, and no more than the model knows (model.vision_size)"
            )
        self._generator, self._vocabulary, self._length = generator, vocabulary, codes_per_frame
        self._session: Any = None
        self._frames: list[NDArray[np.int32]] = []

    def begin(
        self, prompt: VisionPrompt, *, guided: bool, frames: int = 1, given: NDArray[np.integer] | None = None
    ) -> None:
        """Read a prompt; what was written before is forgotten.

        Args:
            guided: whether ``guidance`` other than 1 will be asked for; it costs a second row.
            frames: that will be written, for which room is made.
            given: codes ``[T,n]`` of frames that the clip begins with; those that are written continue them.

        Raises:
            ShapeError: the given frames are none of ``n`` codes of the codebook.
        """
        self.close()
        begun = [] if given is None else list(self._checked(given))
        # The delimiter of the last of them is read with the frame that follows, as after a frame that was written.
        ids = frame_tokens(np.stack(begun), self._vocabulary)[:-1].tolist() if begun else []
        session = self._generator.session(guided=guided)
        other = (*prompt.unconditional, *ids) if guided else None
        session.read((*prompt.conditional, *ids), other, expected=frames * (self._length + 1))
        self._session, self._frames = session, begun

    def _checked(self, given: NDArray[np.integer]) -> NDArray[np.int32]:
        if (
            given.ndim != 2
            or given.shape[1] != self._length
            or given.min(initial=0) < 0
            or (given >= self._count).any()
        ):
            raise ShapeError(
                f"the frames to continue are {list(given.shape)}, codes to {given.max(initial=0)}; expected "
                f"[T, {self._length}] of codes below {self._count}"
            )
        return given.astype(np.int32)

    def write(
        self, count: int, sampling: SamplingSpec, note: Callable[[], None] = lambda: None
    ) -> Iterator[NDArray[np.int32]]:
        """The next ``count`` frames ``[n]``, as they come.

        Args:
            sampling: temperature, guidance and the like, and the seed of the clip; the rest follows from the frame.
            note: called after each code.

        Raises:
            LwmError: the generator gave what is no code, or too few.
        """
        start = self._vocabulary.text_size
        for _ in range(count):
            if self._frames:
                self._session.read([self._vocabulary.eof])
            spec = replace(
                sampling, max_new_tokens=self._length, modality="vision", ids=(start, start + self._count), stop_ids=(),
                seed=_seed(sampling.seed, len(self._frames)),
            )  # fmt: skip
            tokens = []
            with closing(cast(Any, self._session.stream(spec))) as stream:
                for token in stream:
                    tokens.append(token)
                    note()
            codes = np.array(tokens, np.int64) - start
            if len(codes) != self._length or codes.min() < 0 or codes.max() >= self._count:
                raise LwmError(
                    f"the generator gave {len(codes)} tokens for a frame, codes {codes.min(initial=0)} to "
                    f"{codes.max(initial=0)}; expected {self._length} from 0 to {self._count - 1}"
                )
            self._frames.append(codes.astype(np.int32))
            yield self._frames[-1]

    def unguide(self) -> None:
        """The frames to come are drawn without guidance: the second row goes, and what it took."""
        self._session.unguide()

    def end(self) -> list[int]:
        """End the clip with ``eov``; all tokens of the session. Whoever reads on from here needs it."""
        if not self._frames:
            raise LwmError("a clip has no frame yet; write at least one before its end")
        self._session.read([self._vocabulary.eov])
        return list(self._session.tokens)

    @property
    def codes(self) -> NDArray[np.int32]:
        """``[T,n]`` so far, those that were given first."""
        return np.stack(self._frames) if self._frames else np.zeros((0, self._length), np.int32)

    def close(self) -> None:
        """Drop the session."""
        if self._session is not None:
            self._session.close()
        self._session = None


def needs_guidance(*samplings: SamplingSpec) -> bool:
    """Whether any of them asks for an unconditional row."""
    return any(one.guidance != 1.0 for one in samplings)


def write_clip(
    generator: Generator, tokenizer: Tokenizer, vocabulary: Vocabulary, codes_per_frame: int, text: str,
    frames: int = 1, *, kind: Literal["image", "video"] | None = None, first: SamplingSpec = FIRST,
    later: SamplingSpec = LATER, codes: int | None = None,
) -> NDArray[np.int32]:  # fmt: skip
    """Codes ``[T,n]`` int32 of a picture (T = 1) or a video of ``text``, each checked to be one.

    Args:
        frames: T, at least 1.
        kind: what is asked for; ``image`` where there is one frame if none.
        first: how the first frame is drawn.
        later: how the others are; of the seed of the first.
        codes: see :class:`ClipWriter`.
    """
    if frames < 1:
        raise ShapeError(f"a clip of {frames} frames; expected at least 1")
    writer = ClipWriter(generator, vocabulary, codes_per_frame, codes)
    prompt = vision_prompt(kind or ("image" if frames == 1 else "video"), text, tokenizer)
    with closing(writer):
        writer.begin(prompt, guided=needs_guidance(first, *[later][: frames - 1]), frames=frames)
        for _ in writer.write(1, first):
            pass
        if frames > 1 and not needs_guidance(later):
            writer.unguide()
        for _ in writer.write(frames - 1, replace(later, seed=first.seed)):
            pass
        return writer.codes


def _seed(seed: int, frame: int) -> int:
    """Of a frame: clips of seeds beside each other have no frame in common."""
    return int(np.random.SeedSequence([abs(seed), int(seed < 0), frame]).generate_state(1)[0]) >> 1
