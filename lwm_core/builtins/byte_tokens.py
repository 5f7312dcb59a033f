"""The tokenizer ``bytes``: id n is the byte n of the text's UTF-8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from lwm_core.errors import DataError
from lwm_core.protocols import TokenizerContext

BYTES = 256
SPECIAL_IDS: Mapping[str, int] = MappingProxyType({"bos": 256, "eos": 257, "pad": 258})


class BytesTokenizer:
    """UTF-8 bytes as ids 0 to 255, then ``bos``, ``eos`` and ``pad``."""

    @property
    def size(self) -> int:
        """Number of text ids."""
        return BYTES + len(SPECIAL_IDS)

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Ids by role."""
        return SPECIAL_IDS

    def encode(self, text: str) -> list[int]:
        """The bytes of ``text``.

        Raises:
            DataError: ``text`` holds a lone surrogate, which UTF-8 cannot write.
        """
        try:
            return list(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise DataError(f"tokenizer 'bytes': character {error.start} is a lone surrogate, not text") from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; special ids are left out, bytes that are no UTF-8 become U+FFFD.

        Raises:
            DataError: an id is not one of this tokenizer's.
        """
        for one in ids:
            if not 0 <= one < self.size:
                raise DataError(f"tokenizer 'bytes': id {one} is not one of its ids, 0 to {self.size - 1}")
        return bytes(one for one in ids if one < BYTES).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Nothing to write: a model folder without a ``tokenizer.json`` is read with this tokenizer."""


def build(options: object, context: TokenizerContext) -> BytesTokenizer:
    """The factory."""
    return BytesTokenizer()
