"""What a tokenizer plugin gives, and what its factory may need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from lwm_core.protocols.weights import WeightsBundle


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back."""

    @property
    def size(self) -> int:
        """Number of text ids."""
        ...

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Ids by role: ``bos``, ``eos``, ``pad`` where the tokenizer has them."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, no special ids added."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; special ids are left out."""
        ...

    def save(self, folder: Path) -> None:
        """Write what another machine needs to build the same tokenizer."""
        ...


@dataclass(frozen=True)
class TokenizerContext:
    """What a tokenizer factory may need: the folder of the model that the run starts from, and where paths start."""

    weights: WeightsBundle | None = None
    base_dir: Path = Path(".")
