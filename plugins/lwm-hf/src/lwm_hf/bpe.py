"""Training a byte-level BPE (arXiv 1508.07909 over the bytes of UTF-8, as GPT-2 has it), digits one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from lwm_core.errors import DataError, ShapeError

if TYPE_CHECKING:
    from lwm_hf.tokenizer import HfTokenizer

SPECIAL_TOKENS = ("<s>", "</s>", "<pad>", "<vision>", "</vision>")
"""Ids 0 to 4 of a trained tokenizer; the names are Llama's and LWM's."""

MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)


def train_bpe(texts: Iterable[str], vocab_size: int = 4096, *, min_frequency: int = 2) -> HfTokenizer:
    """A byte-level BPE of exactly ``vocab_size`` ids, trained on ``texts``; the same texts give the same tokenizer.

    Every byte has an id, so any text is encoded and comes back exactly. Digits are split singly (a number is a row of
    tokens, copied one by one); other text is split as GPT-2 does before merging. ``</s>`` and the like in ``texts``
    are ordinary letters.

    Args:
        texts: pieces of text; nothing is merged across two of them.
        vocab_size: ids in all, the 256 bytes and :data:`SPECIAL_TOKENS` included.
        min_frequency: times a pair must be seen to be merged.

    Raises:
        ShapeError: ``vocab_size`` has no room for the bytes and the special tokens.
        DataError: the texts are empty, hold a lone surrogate, or are too few for ``vocab_size`` ids.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from lwm_hf.tokenizer import HfTokenizer

    if vocab_size < MIN_VOCAB_SIZE:
        raise ShapeError(
            f"tokenizer 'hf': vocab_size = {vocab_size}; 256 bytes and {len(SPECIAL_TOKENS)} special tokens need at "
            f"least {MIN_VOCAB_SIZE}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_checked(texts), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise DataError(
            f"tokenizer 'hf': the texts give {tokenizer.get_vocab_size()} ids of the {vocab_size} asked for; "
            "train on more text or lower vocab_size"
        )
    return HfTokenizer(tokenizer)


def _checked(texts: Iterable[str]) -> Iterator[str]:
    empty = True
    for text in texts:
        if not text:
            continue
        empty = False
        yield encodable(text)
    if empty:
        raise DataError("tokenizer 'hf': the texts to train on are empty")


def encodable(text: str) -> str:
    """``text`` itself; Python strings can hold halves of characters, which UTF-8 cannot.

    Raises:
        DataError: ``text`` holds a lone surrogate.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"tokenizer 'hf': character {error.start} of the text is a lone surrogate, which no UTF-8 text has; "
            "decode the source with errors='replace'"
        ) from error
    return text
