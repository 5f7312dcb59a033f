"""The text of tokens as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence


def stream_text(ids: Iterator[int], decode: Callable[[Sequence[int]], str], stops: Sequence[str]) -> Iterator[str]:
    """The text of ``ids`` as it grows, up to the first of ``stops``.

    What may still change is held back: an unfinished character (it decodes to U+FFFD) and the beginning of a stop.
    """
    seen: list[int] = []
    shown = 0
    text = ""
    longest = max(map(len, stops), default=1) - 1
    for one in ids:
        seen.append(one)
        text = decode(seen)
        ends = [at for stop in stops if (at := text.find(stop)) >= 0]
        if ends:
            yield text[shown : min(ends)]
            return
        settled = len(text.rstrip("\ufffd"))
        settled = min(settled, len(text) - longest)
        if settled > shown:
            yield text[shown:settled]
            shown = settled
    if len(text) > shown:
        yield text[shown:]
