"""LWM's prompts to the letter, and what of each order is learnt."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwm_core.prompts import ORDERS, TEMPLATES, UNCONDITIONAL, Order, check_template, given_text, lay_out

CLIP = None
GOLDEN: dict[Order, list[tuple[str | None, bool]]] = {
    "text-image": [
        ("You are a helpful assistant. USER: Generate an image of a black dog ASSISTANT: <vision>", False),
        (CLIP, True),
        ("</vision>", True),
    ],
    "text-video": [
        ("You are a helpful assistant. USER: Generate a video of a black dog ASSISTANT: <vision>", False),
        (CLIP, True),
        ("</vision>", True),
    ],
    "image-text": [
        ("You are a helpful assistant. USER: What is this?\n<vision>", False),
        (CLIP, False),
        ("</vision> ASSISTANT:", False),
        (" a black dog", True),
    ],
    "video-text": [
        ("You are a helpful assistant. USER: What is this?\n<vision>", False),
        (CLIP, False),
        ("</vision> ASSISTANT:", False),
        (" a black dog", True),
    ],
    "text": [("a black dog", True)],
    "video": [("<vision>", False), (CLIP, True), ("</vision>", True)],
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_six_orders(order: Order) -> None:
    laid = lay_out(order, TEMPLATES[order], "a black dog", "What is this?")
    assert [(stretch.text, stretch.learnt) for stretch in laid] == GOLDEN[order]
    check_template(order, TEMPLATES[order])


def test_what_generation_and_chat_are_given() -> None:
    """The prompts of LWM's two programs; the unconditional one is ``<vision>`` behind the start token."""
    image = "You are a helpful assistant. USER: Generate an image of {} ASSISTANT: <vision>"
    assert given_text("text-image", TEMPLATES["text-image"], "two {vision}s") == (image.format("two {vision}s"),)
    asked = given_text("video-text", TEMPLATES["video-text"], question="Who?")
    assert asked == ("You are a helpful assistant. USER: Who?\n<vision>", "</vision> ASSISTANT:")
    assert given_text("video", UNCONDITIONAL) == ("<vision>",)
    assert given_text("text", TEMPLATES["text"], "all is learnt") == ()


WORDS = st.text(st.characters(exclude_characters="{}", codec="utf-8"), max_size=8)


@given(st.sampled_from(ORDERS), st.lists(WORDS, min_size=3, max_size=3), WORDS, WORDS)
def test_nothing_is_lost_and_neighbours_differ(order: Order, around: list[str], text: str, question: str) -> None:
    """The stretches are the template filled in; the text or the clip is learnt, and the rest is given."""
    fields = [f"{{{name.replace('image', 'vision').replace('video', 'vision')}}}" for name in order.split("-")]
    template = "{question}" + "".join(a + b for a, b in zip(around, [*fields, ""], strict=False))
    check_template(order, template)
    laid = lay_out(order, template, text, question)
    filled = template.replace("{vision}", "<vision>\0</vision>").replace("{text}", text, 1)
    filled = question + filled.removeprefix("{question}")
    assert "".join("\0" if stretch.text is None else stretch.text for stretch in laid) == filled
    for one, other in itertools.pairwise(laid):
        assert one.text is None or other.text is None or one.learnt != other.learnt
    learnt = [stretch.text for stretch in laid if stretch.learnt]
    if order.endswith("text"):
        assert [words.lstrip(" ") for words in learnt] == ([text.lstrip(" ")] if learnt else [])
    else:
        assert learnt == [None, "</vision>"]


@pytest.mark.parametrize(
    ("order", "template", "words"),
    [
        ("text-image", "{text} {visions}", r"there is no \{visions\}; expected \{text\} before \{vision\}"),
        ("text-image", "{vision} {text}", r"its fields are \{vision\} \{text\}; expected \{text\} before \{vision\}"),
        ("video-text", "{text} {vision}", r"expected \{vision\} before \{text\}, each once"),
        ("video-text", "{vision}{vision}{text}", "each once"),
        ("text", "no field", r"its fields are none; expected \{text\}, each once"),
        ("text", "{text} of {vision}", r"expected \{text\}, each once"),
        ("video", "{text}{vision}", r"expected \{vision\}, each once"),
        ("image-text", "{question}{question}{vision}{text}", "each once"),
        ("image-text", "{vision}{text}{question}", r"\{question\} stands last"),
    ],
)
def test_templates_that_do_not_lay_out_their_order_are_refused(order: Order, template: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        check_template(order, template)
    assert "\n" not in str(caught.value)
