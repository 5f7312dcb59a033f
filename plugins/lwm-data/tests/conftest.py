"""Fixtures of the data plugin's tests: the bytes tokenizer, and ``mix`` sources built as the registry builds them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

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
    """``open_source(sources, seed=0, tokenizer=bytes, vision=(), **other options)``; paths start in ``tmp_path``.

    ``vision`` is (rows, codes) of the vocabulary's vision part.
    """

    def build(
        sources: dict[str, Any],
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
        vision: tuple[int, ...] = (),
        **options: Any,
    ) -> MixSource:
        used = tokenizer or BytesTokenizer()
        context = DataContext(used, Vocabulary(used.size, *vision), seed, tmp_path)
        return open_mix(MixOptions.model_validate({"sources": sources, **options}), context)

    return build


@pytest.fixture
def write_codes(tmp_path: Path) -> Callable[..., Path]:
    """``write_codes(folder, {name: [T, n] codes or why it broke}, entries=9, weights="0", shard_frames=4)``.

    A folder of codes as its layout's page says, written by hand: the encoder's plugin need not be there.
    """

    def write(folder: str, clips: dict[str, Any], entries: int = 9, weights: str = "0", shard_frames: int = 4) -> Path:
        out = tmp_path / folder
        out.mkdir()
        codes = {name: np.zeros((0, 0), int) if isinstance(one, str) else np.array(one) for name, one in clips.items()}
        rows = [row for one in codes.values() for row in one.tolist()]
        shards = []
        for at in range(0, len(rows), shard_frames):
            part = np.array(rows[at : at + shard_frames], "<u2")
            data = save({"codes": part, "times": np.zeros(len(part))})
            name = f"{len(shards):05d}.safetensors"
            (out / name).write_bytes(data)
            digest = hashlib.sha256(data).hexdigest()
            shards.append({"file": name, "frames": len(part), "size": len(data), "sha256": digest})
        videos, start = [], 0
        for name, one in codes.items():
            broken = clips[name] if isinstance(clips[name], str) else ""
            frames = {"start": start, "frames": len(one), "fps": None}
            videos.append(json.dumps({"name": name, "size": 1, **frames, "broken": broken}) + "\n")
            start += len(one)
        lines = "".join(videos).encode()
        (out / "videos.jsonl").write_bytes(lines)
        settings = {"encoder": "a:b", "checksum": weights * 64, "options": {}, "codes": entries, "frame_size": 16,
                    "frames": None, "fps": None, "batch": 1, "shard_frames": shard_frames}  # fmt: skip
        manifest = {"format": 1, "settings": settings, "complete": True, "frames": len(rows), "current": None,
                    "tokens_per_frame": len(rows[0]) if rows else 0, "videos": len(videos), "shards": shards,
                    "videos_size": len(lines), "videos_sha256": hashlib.sha256(lines).hexdigest()}  # fmt: skip
        (out / "manifest.json").write_text(json.dumps(manifest))
        return out

    return write
