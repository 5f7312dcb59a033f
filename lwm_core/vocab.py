"""One id space for all modalities: text ids first, vision ids after them, delimiters inside the vision slice.

A token's modality follows from its id alone, so one embedding table and one output head serve every modality and a
checkpoint is a plain Llama. LWM keeps two tables and two heads instead (arXiv 2402.08268, section 4); concatenating
them gives this one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lwm_core.errors import ShapeError


@dataclass(frozen=True)
class Vocabulary:
    """Text ids ``[0, text_size)``, vision ids ``[text_size, text_size + vision_size)``.

    Args:
        text_size: number of text ids.
        vision_size: rows kept for vision; 0 for a text-only model. Codes, ``eof``, ``eov``, then reserve (LWM: 8448).
        vision_codes: codebook size of the vision encoder (LWM: 8192).

    Raises:
        ShapeError: the vision slice has no room for its codes and the two delimiters.
    """

    text_size: int
    vision_size: int = 0
    vision_codes: int = 8192

    def __post_init__(self) -> None:
        if self.text_size <= 0:
            raise ShapeError(f"vocabulary: text_size is {self.text_size}; expected a positive number of text ids")
        if self.vision_size and self.vision_size < self.vision_codes + 2:
            raise ShapeError(
                f"vocabulary: vision_size is {self.vision_size}, but {self.vision_codes} codes and two delimiters "
                f"need {self.vision_codes + 2}; enlarge vision_size or set it to 0"
            )

    @property
    def size(self) -> int:
        """Rows of the embedding table."""
        return self.text_size + self.vision_size

    @property
    def slices(self) -> dict[str, slice]:
        """Id range of each modality that the vocabulary holds, in id order."""
        ranges = {"text": slice(0, self.text_size)}
        if self.vision_size:
            ranges["vision"] = slice(self.text_size, self.size)
        return ranges

    @property
    def eof(self) -> int:
        """Id that ends every frame of a clip but the last."""
        return self._vision_id(self.vision_codes)

    @property
    def eov(self) -> int:
        """Id that ends the last frame of a clip."""
        return self._vision_id(self.vision_codes + 1)

    def _vision_id(self, code: int) -> int:
        if not self.vision_size:
            raise ShapeError("this vocabulary has no vision ids; set model.vision_size")
        return self.text_size + code

    def vision_ids(self, codes: NDArray[np.integer]) -> NDArray[np.int32]:
        """Ids of codebook entries ``codes`` (any shape, values in ``[0, vision_codes)``)."""
        self._vision_id(0)
        if codes.size and (codes.min() < 0 or codes.max() >= self.vision_codes):
            raise ShapeError(
                f"vision codes run from {codes.min()} to {codes.max()}; expected 0 to {self.vision_codes - 1}"
            )
        # int64 first: codes may be kept as uint16, where the offset would wrap round.
        return (codes.astype(np.int64) + self.text_size).astype(np.int32)

    def is_vision(self, ids: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Which of ``ids`` are vision ids."""
        return np.asarray(ids) >= self.text_size
