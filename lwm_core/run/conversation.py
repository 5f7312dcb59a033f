"""Questions and answers in one session: how they are framed, what is read for each, and the answer as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from lwm_core.errors import DataError, UsageError
from lwm_core.needles import PROMPT_END
from lwm_core.protocols import Generator, SamplingSpec, Session, Tokenizer
from lwm_core.run.streaming import stream_text

PART = 16_384
"""Tokens of a document or of what is shown that are read at a time: between two parts progress is told, and whoever
reads may give up."""

QUESTION = "{question}"


@dataclass(frozen=True)
class Template:
    """What stands around questions and a document.

    Args:
        system: before all else.
        before: before a question.
        after: between a question and its answer.
        document: before a document or what is shown, and between a document and the first question.
        after_document: what ``after`` is where there is a document.
        shown: between pictures or video and the question that they stand before, but for a document's first.
    """

    system: str = ""
    before: str = ""
    after: str = ""
    document: tuple[str, str] = ("", "")
    after_document: str = ""
    shown: str = ""


TEMPLATES = {
    "lwm": Template("You are a helpful assistant.", " USER: ", " ASSISTANT:", (" USER: ", " "), PROMPT_END, "\n"),
    "plain": Template(),
}
"""``lwm`` has the words that the needle task trains on (``lwm_core.needles``); ``plain`` has none. What is shown
stands before the first question, where LWM's own chat has it after: so it is read once, whatever is asked."""


def make_template(told: str, system: str | None = None) -> Template:
    """The template of this name, or of a text with ``{question}`` in it.

    Args:
        told: the name or the text.
        system: what stands before all else; the template's own if none.

    Raises:
        UsageError: it is neither.
    """
    made = TEMPLATES.get(told)
    if made is None:
        if told.count(QUESTION) != 1:
            names = ", ".join(TEMPLATES)
            raise UsageError(f"--template is {told!r}; expected {names}, or a text with {QUESTION} in it once")
        before, after = told.split(QUESTION)
        made = Template("", before, after, ("", before), after, before)
    return made if system is None else replace(made, system=system)


class Answer:
    """An answer: iterate once over its text, which comes as it is written; then the facts are whole.

    Attributes:
        kept: tokens that were in the cache before the question, and were not read again.
        read: tokens that were read for it.
        read_seconds: time that this took.
        tokens: written so far.
        seconds: time that writing took.
        text: so far.
        ended: by the model, at the most tokens, before a stop text, or by whoever asked.
    """

    def __init__(self, kept: int, read: int, read_seconds: float, pieces: Callable[[Answer], Iterator[str]]) -> None:
        self.kept, self.read, self.read_seconds = kept, read, read_seconds
        self.tokens, self.seconds, self.text = 0, 0.0, ""
        self.ended: Literal["eos", "length", "stop", "interrupt"] = "stop"
        self._pieces = pieces

    def __iter__(self) -> Iterator[str]:
        began = time.perf_counter()
        try:
            for piece in self._pieces(self):
                self.text += piece
                yield piece
        finally:
            self.seconds = time.perf_counter() - began

    @property
    def context(self) -> int:
        """Tokens of all that the next question stands behind."""
        return self.kept + self.read + self.tokens

    @property
    def speed(self) -> float:
        """Tokens written a second."""
        return self.tokens / max(self.seconds, 1e-9)


class Conversation:
    """Pictures, video and a document, if any, and questions about them. They and all turns before stay in the cache.

    Args:
        generator: of the model that answers.
        tokenizer: its.
        template: what stands around questions.
        document: a text that is read before the first.
        shown: ids of pictures and video that are read before that; see ``lwm_core.run.vision.vision_block``.

    Raises:
        DataError: the document gives no token.
    """

    def __init__(
        self, generator: Generator, tokenizer: Tokenizer, template: Template, document: str | None = None,
        shown: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self._generator, self._tokenizer, self._template, self._shown = generator, tokenizer, template, shown
        self._document = None if document is None else tokenizer.encode(document)
        if self._document is not None and not self._document:
            raise DataError("the document gives no token; give one that has a text")
        self._session: Session | None = None
        self._last: Answer | None = None
        self._begun = False  # whether what is in the session ends within a turn, before its question

    def begin(self) -> Iterator[tuple[int, int]]:
        """Forget the turns that there were, and read what comes before them: tokens so far, and of all, by parts."""
        if self._session is not None:
            self._session.close()
        self._session, self._last, self._begun = self._generator.session(), None, False
        if self._document is None and not self._shown:
            return
        start = self._tokenizer.encode(self._template.system + self._template.document[0])
        yield from self._read([*self._special("bos"), *start, *self._shown, *(self._document or ())])
        self._begun = self._document is None

    def show(self, ids: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Read a picture or a video now, before the next question: tokens so far, and of all, by parts.

        Args:
            ids: of ``lwm_core.run.vision.vision_block``.
        """
        first, t = self._last is None, self._template
        before: list[int] = []
        if not self._begun and (self._document is None or not first):
            start = self._special("bos") if first else self._ending()
            before = [*start, *self._tokenizer.encode((t.system if first else "") + t.document[0])]
        yield from self._read([*before, *ids])
        self._begun = self._document is None or not first

    def _read(self, ids: Sequence[int]) -> Iterator[tuple[int, int]]:
        assert self._session is not None, "begin comes first"
        for at in range(0, len(ids), PART):
            self._session.read(ids[at : at + PART])
            yield min(at + PART, len(ids)), len(ids)

    def ask(
        self, question: str, sampling: SamplingSpec, stops: Sequence[str] = (), go_on: Callable[[], bool] = lambda: True
    ) -> Answer:
        """Read a question; the answer is written as the caller takes it.

        Args:
            question: not empty.
            sampling: how the answer is drawn; its stop id is the tokenizer's ``eos``.
            stops: texts before which it ends.
            go_on: asked before each token.
        """
        session = self._session
        assert session is not None, "begin comes first"
        kept, ids, began = len(session.tokens), self._framed(question), time.perf_counter()
        session.read(ids)

        def written(answer: Answer) -> Iterator[int]:
            with closing(cast(Any, session.stream(sampling))) as stream:
                while go_on():
                    token = next(stream, None)
                    if token is None:
                        answer.ended = "length" if answer.tokens == sampling.max_new_tokens else "eos"
                        return
                    answer.tokens += 1
                    yield token
                answer.ended = "interrupt"

        def pieces(answer: Answer) -> Iterator[str]:
            with closing(cast(Any, written(answer))) as ids:
                yield from stream_text(ids, self._tokenizer.decode, stops)

        self._last, self._begun = Answer(kept, len(ids), time.perf_counter() - began, pieces), False
        return self._last

    def _framed(self, question: str) -> list[int]:
        """Ids of a question. After a document its pieces are encoded as those of ``lwm_core.needles.build_prompt``."""
        t, encode = self._template, self._tokenizer.encode
        after = t.after if self._document is None else t.after_document
        if self._begun:
            return encode(t.shown + question + after)
        if self._last is not None:
            return [*self._ending(), *encode(t.before + question + after)]
        if self._document is not None:
            return [*encode(t.document[1] + question), *encode(after)]
        return [*self._special("bos"), *encode(t.system + t.before + question + after)]

    def _ending(self) -> list[int]:
        """What the model ended its last answer with, which is not in the session yet."""
        return self._special("eos") if self._last is not None and self._last.ended == "eos" else []

    def _special(self, role: str) -> list[int]:
        ids = self._tokenizer.special_ids
        return [ids[role]] if role in ids else []
