"""Source ``needle``: LWM's needle task on real text (arXiv 2402.08268, section 5.2); only the answers are learnt.

The words, the split of cities and numbers and the layout of the prompt are ``lwm_core.needles``', which evaluation uses
too: training takes the ``train`` split and the train part of the haystack's text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lwm_core.batch import TokenSequence
from lwm_core.errors import ShapeError
from lwm_core.needles import (
    DIGITS,
    PROMPT_END,
    Needle,
    answer_ids,
    build_prompt,
    cities,
    draw_needles,
    fit_haystack,
    question,
)
from lwm_core.protocols import Tokenizer
from lwm_data.corpus import Corpus
from lwm_data.options import NeedleOptions
from lwm_data.sources.base import Item, Key, example, generator, plan_lengths

MEMO = 1 << 16


class MemoEncode:
    """A tokenizer's ``encode`` that remembers the short texts of which there are few."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        ids = self._known.get(text)
        if ids is None:
            if len(self._known) >= MEMO:
                self._known = {}
            ids = self._known[text] = list(self._tokenizer.encode(text))
        return ids

    def __reduce__(self) -> tuple[Callable[[Tokenizer], MemoEncode], tuple[Tokenizer]]:
        return MemoEncode, (self._tokenizer,)


@dataclass(frozen=True)
class _Task:
    """What is planted, and what each turn asks for."""

    needles: list[Needle]
    turns: list[list[Needle]]


class NeedleSource:
    """An item is (number, length); everything else comes from the example's own random numbers."""

    def __init__(
        self,
        name: str,
        options: NeedleOptions,
        haystack: Corpus,
        tokenizer: Tokenizer,
        ends: frozenset[int],
        seq_len: int,
    ) -> None:
        """Raises ShapeError where the longest question does not fit ``seq_len``; the message says what does."""
        self._name, self._options, self._haystack, self._ends, self._seq_len = name, options, haystack, ends, seq_len
        self._encode = MemoEncode(tokenizer)
        self._bos, self._eos = (tokenizer.special_ids.get(role) for role in ("bos", "eos"))
        self._lengths = options.lengths(seq_len)
        if self._lengths[0] > self._lengths[1]:
            raise ShapeError(
                f"needle source {name!r}: min_tokens is {options.min_tokens}, but the stage's rows have {seq_len}"
            )
        self._check_fit(self._longest())

    def plan(self, rows: int, key: Key) -> list[list[Item]]:
        """See :class:`~lwm_data.sources.base.Source`."""

        def need(number: int) -> int:
            return self._check_fit(self._draw(generator(key, number)))

        return plan_lengths(rows, self._seq_len, self._lengths, key, need)

    def build(self, item: Item, key: Key) -> TokenSequence:
        """See :class:`~lwm_data.sources.base.Source`."""
        number, length = int(item[0]), int(item[1])
        random = generator(key, number)
        task = self._draw(random)
        size = length - self._check_fit(task)
        haystack = self._haystack.span(int(random.integers(len(self._haystack.tokens))), size).tolist()
        depths = random.random(len(task.needles)).tolist()
        planted = list(zip(depths, task.needles, strict=True))
        prompt = build_prompt(haystack, planted, task.turns[0], self._encode, self._ends, self._bos)
        ids, learnt = prompt, [False] * len(prompt)
        for turn, asked in enumerate(task.turns):
            if turn:
                again = self._question(asked)
                ids.extend(again)
                learnt.extend([False] * len(again))
            answer = answer_ids(asked, self._encode, self._eos)
            ids.extend(answer)
            learnt.extend([True] * len(answer))
        return example(ids, np.array(learnt), self._options.share)

    def _draw(self, random: np.random.Generator) -> _Task:
        options = self._options
        planted = int(random.choice(options.needles))
        asked = int(random.choice([count for count in options.retrieve if count <= planted]))
        needles = draw_needles(random, planted, "train")
        order = random.permutation(planted)
        turns = [[needles[int(order[(turn * asked + i) % planted])] for i in range(asked)]
                 for turn in range(options.turns)]  # fmt: skip
        return _Task(needles, turns)

    def _longest(self) -> _Task:
        """The task with the most needles, the most asked, and the cities of the most tokens."""
        count = max(self._options.needles)
        asked = max(number for number in self._options.retrieve if number <= count)
        names = sorted(cities("train"), key=lambda city: len(self._encode(Needle(city, "9" * DIGITS).text)))[-count:]
        draw_needles(np.random.default_rng(0), count, "train")  # refuses more needles than there are cities
        needles = [Needle(city, "9" * DIGITS) for city in names]
        return _Task(needles, [needles[-asked:]] * self._options.turns)

    def _question(self, asked: Sequence[Needle]) -> list[int]:
        return [*self._encode(question(asked)), *self._encode(PROMPT_END)]

    def _check_fit(self, task: _Task) -> int:
        """Tokens of the task without any haystack."""
        spacious = 1 << 40
        fixed = spacious - fit_haystack(spacious, task.needles, task.turns[0], self._encode, self._bos)
        tail = sum(len(answer_ids(asked, self._encode, self._eos)) for asked in task.turns)
        need = fixed + tail + sum(len(self._question(asked)) for asked in task.turns[1:])
        longest = self._lengths[1]
        if need > longest:
            what, longer = (
                ("the stage's rows have", "seq_len") if longest == self._seq_len else ("an example has", "max_tokens")
            )
            raise ShapeError(
                f"needle source {self._name!r}: {len(task.needles)} needle(s), {len(task.turns)} question(s) and the "
                f"answers need {need} tokens, but {what} {longest}; use a larger {longer}, fewer needles or fewer turns"
            )
        return need
