"""Fixtures of the data plugin's tests: the bytes tokenizer, and ``mix`` sources built as the registry builds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lwm_core.builtins.byte_tokens import BytesTokenizer
from lwm_core.protocols import DataContext, Tokenizer
from lwm_core.vocab import Vocabulary
from lwm_data.feed import MixSource, open_mix
from lwm_data.options import MixOptions


class PlainTokenizer:
    """Characters below 128 as ids, and no special id at all."""

    size = 128
    special_ids: Mapping[str, int] = {}

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def save(self, folder: Path) -> None:
        raise AssertionError("a feed never saves the tokenizer")


@pytest.fixture
def tokenizer() -> BytesTokenizer:
    return BytesTokenizer()


@pytest.fixture
def plain_tokenizer() -> PlainTokenizer:
    return PlainTokenizer()


@pytest.fixture
def open_source(tmp_path: Path) -> Callable[..., MixSource]:
    """``open_source(sources, seed=0, tokenizer=bytes, **other options)``; paths start in ``tmp_path``."""

    def build(sources: dict[str, Any], seed: int = 0, tokenizer: Tokenizer | None = None, **options: Any) -> MixSource:
        used = tokenizer or BytesTokenizer()
        context = DataContext(used, Vocabulary(used.size), seed, tmp_path)
        return open_mix(MixOptions.model_validate({"sources": sources, **options}), context)

    return build
