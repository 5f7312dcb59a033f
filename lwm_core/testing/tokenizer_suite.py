"""The conformance kit of tokenizers: nothing is lost, ids stay in range, a saved one is the same one."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from lwm_core.protocols import Tokenizer
from lwm_core.testing.suite import Suite

TEXTS = (
    "",
    " ",
    "In the beginning God created the heaven and the earth.",
    "The special magic Lisbon number is: 7184265",
    "two  spaces, a\ttab,\r\na line break\n\n and a trailing space ",
    "Grüße, 世界, здравствуй, 🧵 and e\u0301 apart from é",
    "<s> </s> <pad> are three words here",
)


class TokenizerSuite(Suite):
    """Subclass it and give :meth:`make`.

    Attributes:
        texts: what must survive encoding and decoding.
    """

    texts: ClassVar[tuple[str, ...]] = TEXTS

    def make(self) -> Tokenizer:
        """The tokenizer under test, ready to encode."""
        raise NotImplementedError(f"{type(self).__name__}.make() must give the tokenizer under test")

    def load(self, folder: Path) -> Tokenizer:
        """The tokenizer that :meth:`Tokenizer.save` wrote into ``folder``."""
        raise NotImplementedError(f"{type(self).__name__}.load() must read what save() wrote")

    def test_decoding_undoes_encoding(self) -> None:
        """Every text comes back to the letter."""
        tokenizer = self.make()
        for text in self.texts:
            assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_ids_are_in_range(self) -> None:
        """Ids are plain integers of [0, size), special ids too, which differ from each other and encode no text."""
        tokenizer = self.make()
        special = list(tokenizer.special_ids.values())
        assert len(set(special)) == len(special)
        assert all(0 <= i < tokenizer.size for i in special)
        for text in self.texts:
            ids = tokenizer.encode(text)
            assert all(type(i) is int and 0 <= i < tokenizer.size for i in ids)
            assert not set(ids) & set(special), f"{text!r} encodes to a special id"

    def test_special_ids_are_left_out_of_text(self) -> None:
        """Decoding skips special ids."""
        tokenizer = self.make()
        ids = tokenizer.encode("before")
        for name, special in tokenizer.special_ids.items():
            assert tokenizer.decode([special, *ids, special]) == "before", f"{name} shows in decoded text"

    def test_a_saved_tokenizer_is_the_same(self, tmp_path: Path) -> None:
        """Saved and loaded, it has the same size, special ids and encodings."""
        first = self.make()
        first.save(tmp_path)
        second = self.load(tmp_path)
        assert (second.size, dict(second.special_ids)) == (first.size, dict(first.special_ids))
        for text in self.texts:
            assert second.encode(text) == first.encode(text)

    @pytest.mark.parametrize("text", ["a", "word word", "12"])
    def test_encoding_is_a_function(self, text: str) -> None:
        """The same text gives the same ids from any instance; no special id is added."""
        assert self.make().encode(text) == self.make().encode(text)
        assert self.make().encode(text), "text encodes to nothing"
