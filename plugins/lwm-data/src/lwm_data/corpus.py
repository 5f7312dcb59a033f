"""A text source in memory: its documents split into train and held out, and the train part as token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lwm_core.errors import DataError
from lwm_core.protocols import Tokenizer
from lwm_data.options import TextOptions
from lwm_data.read import corpus_file, find_files, read_documents

CHUNK = 1 << 18
"""Characters that are encoded at once; a longer document is encoded in chunks of whole lines."""


@dataclass(frozen=True)
class Texts:
    """Documents of a text source: those to train on and those that are never trained on."""

    train: Sequence[str]
    held_out: Sequence[str]


@dataclass(frozen=True)
class Corpus:
    """Token ids of the train documents laid end to end: document d is ``tokens[offsets[d]:offsets[d + 1]]``."""

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]

    def span(self, start: int, length: int) -> NDArray[np.int32]:
        """``length`` ids from ``start`` on; a text that ends before is read round again from its beginning."""
        if start + length <= len(self.tokens):
            return self.tokens[start : start + length]
        return np.take(self.tokens, np.arange(start, start + length), mode="wrap")


def files_of(options: TextOptions, base: Path, name: str) -> list[Path]:
    """The files of a text source."""
    if options.corpus is not None:
        return [corpus_file(options.corpus)]
    assert options.path is not None
    return find_files(options.path, base, f"text source {name!r}")


def read_texts(options: TextOptions, files: Sequence[Path], name: str) -> Texts:
    """Read and split a text source.

    Raises:
        DataError: a file cannot be used, there is no text, or nothing can be held out of it.
    """
    documents = [document for file in files for document in read_documents(file, options.split)]
    if not documents:
        raise DataError(f"text source {name!r}: {files[0]}{' and the others' * (len(files) > 1)} hold no text")
    if not options.held_out:
        return Texts(documents, ())
    # Enough documents: the last of them are held out whole. Few: the last lines of each.
    count = round(len(documents) * options.held_out)
    if count:
        if count == len(documents):
            raise DataError(
                f"text source {name!r}: held_out = {options.held_out} of {len(documents)} documents leaves none to "
                "train on; lower it"
            )
        return Texts(documents[:-count], documents[-count:])
    parts = [_split_lines(document, options.held_out) for document in documents]
    texts = Texts([train for train, _ in parts if train.strip()], [rest for _, rest in parts if rest.strip()])
    if not texts.train or not texts.held_out:
        raise DataError(
            f"text source {name!r}: held_out = {options.held_out} cannot be split off {len(documents)} document(s) of "
            "so few lines; set held_out = 0 or give more text"
        )
    return texts


def _split_lines(document: str, fraction: float) -> tuple[str, str]:
    lines = document.splitlines(keepends=True)
    count = max(1, round(len(lines) * fraction))
    return "".join(lines[:-count]), "".join(lines[-count:])


def encode_corpus(documents: Sequence[str], tokenizer: Tokenizer, name: str) -> Corpus:
    """Token ids of ``documents``, each with the tokenizer's ``bos`` before and ``eos`` behind where it has them.

    Raises:
        DataError: the documents give no token.
    """
    special = tokenizer.special_ids
    before, behind = ([special[role]] if role in special else [] for role in ("bos", "eos"))
    arrays: list[NDArray[np.int32]] = []
    for document in documents:
        parts = [np.asarray(tokenizer.encode(chunk), np.int32) for chunk in _chunks(document)]
        if sum(map(len, parts)):
            arrays.append(np.concatenate([np.asarray(before, np.int32), *parts, np.asarray(behind, np.int32)]))
    if not arrays:
        raise DataError(f"text source {name!r}: the tokenizer makes no token of its text")
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])])
    return Corpus(np.concatenate(arrays), offsets.astype(np.int64))


def _chunks(document: str) -> Iterator[str]:
    start = 0
    while start < len(document):
        end = document.find("\n", start + CHUNK) + 1 or len(document)
        yield document[start:end]
        start = end
