"""Source ``copy``: what was seen before is asked again; dense practice for induction and retrieval.

``repeat``: a span of tokens comes again, at once or after other tokens (the repeated random sequences on which
induction heads are measured: Olsson et al. 2022, arXiv 2209.11895). ``pairs``: ``key: value`` lines of digits, then the
same keys in another order, the values learnt.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lwm_core.batch import TokenSequence
from lwm_core.errors import ShapeError
from lwm_core.needles import DIGITS, is_held_out
from lwm_core.protocols import Tokenizer
from lwm_data.corpus import Corpus
from lwm_data.options import CopyOptions
from lwm_data.sources.base import Item, Key, example, generator, plan_lengths
from lwm_data.sources.needle import MemoEncode


class _Planned:
    """Examples made to measure. An item is (number, length)."""

    def __init__(self, name: str, options: CopyOptions, seq_len: int, need: int, what: str) -> None:
        shortest, longest = self._lengths = options.lengths(seq_len)
        if shortest < need or shortest > longest:
            raise ShapeError(
                f"copy source {name!r}: {what} need {need} tokens, but min_tokens is {options.min_tokens}, max_tokens "
                f"is {options.max_tokens}, and the stage's rows have {seq_len}"
            )
        self._options, self._seq_len = options, seq_len

    def plan(self, rows: int, key: Key) -> list[list[Item]]:
        """See :class:`~lwm_data.sources.base.Source`."""
        return plan_lengths(rows, self._seq_len, self._lengths, key)


class RepeatSource(_Planned):
    """Spans of text, or of random text ids where ``text`` is none."""

    def __init__(
        self, name: str, options: CopyOptions, tokenizer: Tokenizer, text: Corpus | None, seq_len: int
    ) -> None:
        super().__init__(name, options, seq_len, 2 * options.min_period, "a shortest span and its repeat")
        self._text = text
        special = set(tokenizer.special_ids.values())
        self._alphabet = np.array([i for i in range(tokenizer.size) if i not in special], np.int32)

    def build(self, item: Item, key: Key) -> TokenSequence:
        """A span, then its repeats: half of the examples at once, half after a gap of other tokens.

        A repeat's first token is not learnt where nothing tells that it comes.
        """
        number, length = int(item[0]), int(item[1])
        random = generator(key, number)
        longest = min(self._options.max_period or length, length // 2)
        low, high = np.log(self._options.min_period), np.log(longest + 1)
        period = min(longest, int(np.exp(random.uniform(low, high))))
        gap = int(random.integers(1, length - 2 * period + 1)) if random.random() < 0.5 and length > 2 * period else 0
        span = self._span(random, period)
        ids, learnt = [span], [np.zeros(period, bool)]
        filled = period
        while filled < length:
            repeat = np.ones(period, bool)
            repeat[0] = not gap and len(ids) > 1
            ids += [self._span(random, gap), span]
            learnt += [np.zeros(gap, bool), repeat]
            filled += gap + period
        return example(np.concatenate(ids)[:length], np.concatenate(learnt)[:length], self._options.share)

    def _span(self, random: np.random.Generator, length: int) -> NDArray[np.int32]:
        if self._text is None:
            return random.choice(self._alphabet, size=length)
        return self._text.span(int(random.integers(len(self._text.tokens))), length)


class PairsSource(_Planned):
    """Lines ``key: value``, half of the length; then the keys in random orders until the length is full."""

    def __init__(self, name: str, options: CopyOptions, tokenizer: Tokenizer, seq_len: int) -> None:
        self._encode = MemoEncode(tokenizer)
        widest = max(
            len(self._line(str(digit) * options.key_digits, str(digit) * options.value_digits)[0])
            for digit in range(10)
        )
        super().__init__(name, options, seq_len, 2 * widest, "a pair and its question")

    def build(self, item: Item, key: Key) -> TokenSequence:
        """See :class:`~lwm_data.sources.base.Source`; whole lines, so that the end of the length may stay free."""
        number, length = int(item[0]), int(item[1])
        random = generator(key, number)
        lines: dict[str, tuple[list[int], list[bool]]] = {}
        half = 0
        while len(lines) < 10**self._options.key_digits // 2:
            name = _digits(random, self._options.key_digits)
            line = self._line(name, _digits(random, self._options.value_digits))
            if half + len(line[0]) > length // 2:
                break
            if name not in lines:
                lines[name] = line
                half += len(line[0])
        listed = list(lines.values())
        ids = [i for line, _ in listed for i in line]
        learnt = [False] * len(ids)
        while listed:
            for number in random.permutation(len(listed)):
                again, values = listed[int(number)]
                if len(ids) + len(again) > length:
                    return example(ids, np.array(learnt), self._options.share)
                ids.extend(again)
                learnt.extend(values)
        raise AssertionError("the constructor has checked that a pair fits")

    def _line(self, name: str, value: str) -> tuple[list[int], list[bool]]:
        pieces = [self._encode(text) for text in (name, ": ", value, "\n")]
        return [i for piece in pieces for i in piece], [k == 2 for k, piece in enumerate(pieces) for _ in piece]


def _digits(random: np.random.Generator, count: int) -> str:
    """A number of ``count`` digits; as long as a needle's, it is none of those that are held out."""
    number = int(random.integers(10**count))
    while count == DIGITS and is_held_out(number):
        number = int(random.integers(10**count))
    return f"{number:0{count}d}"
