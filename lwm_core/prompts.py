"""How text and a clip stand together in an example: LWM's prompts, and which part of them is learnt.

Training data, generation and evaluation must agree on these to the letter, so they stand here once (LWM's scripts
``vision_chat.py`` and ``vision_generation.py``; arXiv 2402.08268, section 4). A template is text with ``{vision}``,
``{text}`` and ``{question}`` in it; what its order names last is learnt, and everything before it is given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from types import MappingProxyType
from typing import Literal, get_args

from lwm_core.frames import VISION_END, VISION_START

Order = Literal["text-image", "image-text", "text-video", "video-text", "text", "video"]
"""What an example holds, in order; the last is learnt. ``video`` alone is a clip of any number of frames."""

ORDERS: tuple[Order, ...] = get_args(Order)

PROMPT_START = "You are a helpful assistant. USER: "

TEMPLATES: Mapping[Order, str] = MappingProxyType(
    {
        "text-image": PROMPT_START + "Generate an image of {text} ASSISTANT: {vision}",
        "image-text": PROMPT_START + "{question}\n{vision} ASSISTANT: {text}",
        "text-video": PROMPT_START + "Generate a video of {text} ASSISTANT: {vision}",
        "video-text": PROMPT_START + "{question}\n{vision} ASSISTANT: {text}",
        "text": "{text}",
        "video": "{vision}",
    }
)

UNCONDITIONAL = "{vision}"
"""A clip without the text that it was made after, for classifier-free guidance: its prompt is ``<s><vision>``."""

_FIELD = re.compile(r"\{([^{}]*)\}")
# Spaces before the text belong to it: a prompt ends "ASSISTANT:", and the answer begins with the space.
_SPACED = re.compile(r"( *\{text\}|\{question\}|\{vision\})")


@dataclass(frozen=True)
class Stretch:
    """A part of an example that is encoded by itself.

    Args:
        text: what stands there; none where the clip's frame blocks stand.
        learnt: whether its tokens are targets.
    """

    text: str | None
    learnt: bool


def check_template(order: Order, template: str) -> None:
    """Refuse a template that does not lay out its order.

    Raises:
        ValueError: a field is unknown, missing, there twice, or out of order.
    """
    wanted = {"text": ["text"], "video": ["vision"]}.get(order)
    if wanted is None:
        wanted = ["text", "vision"] if order.startswith("text-") else ["vision", "text"]
    found = _FIELD.findall(template)
    shown = " before ".join(f"{{{name}}}" for name in wanted)
    unknown = [name for name in found if name not in ("text", "vision", "question")]
    if unknown:
        raise ValueError(f"template {order!r}: there is no {{{unknown[0]}}}; expected {shown}, and {{question}} or not")
    if [name for name in found if name != "question"] != wanted or found.count("question") > 1:
        got = " ".join(f"{{{name}}}" for name in found) or "none"
        raise ValueError(f"template {order!r}: its fields are {got}; expected {shown}, each once")
    if "question" in found and found[-1] == "question":
        raise ValueError(f"template {order!r}: {{question}} stands last; expected it before what is learnt, {shown}")


def lay_out(order: Order, template: str, text: str = "", question: str = "") -> tuple[Stretch, ...]:
    """The stretches of an example, neighbours that are learnt or given alike as one, so that they are encoded as one.

    ``{vision}`` becomes ``<vision>``, the clip and ``</vision>``. Where the clip is learnt ``</vision>`` is learnt too,
    and ``<vision>`` is given: it is the end of the prompt.
    """
    learnt = "vision" if order in ("text-image", "text-video", "video") else "text"
    stretches: list[Stretch] = []

    def add(words: str, is_learnt: bool) -> None:
        last = stretches[-1] if stretches else None
        if last is not None and last.text is not None and last.learnt == is_learnt:
            stretches[-1] = Stretch(last.text + words, is_learnt)
        elif words:
            stretches.append(Stretch(words, is_learnt))

    for part in _SPACED.split(template):
        if part == "{vision}":
            add(VISION_START, False)
            stretches.append(Stretch(None, learnt == "vision"))
            add(VISION_END, learnt == "vision")
        elif part.lstrip(" ") == "{text}":
            add(part.replace("{text}", text), learnt == "text")
        else:
            add(question if part == "{question}" else part, False)
    return tuple(stretches)


def given_text(order: Order, template: str, text: str = "", question: str = "") -> tuple[str, ...]:
    """The words of an example up to what is learnt: what a model that learnt from ``template`` is given.

    One text for the orders that end with a clip (it ends with ``<vision>``); two for those that ask about one, before
    and after its frames.
    """
    given = takewhile(lambda stretch: not stretch.learnt, lay_out(order, template, text, question))
    return tuple(stretch.text for stretch in given if stretch.text is not None)
