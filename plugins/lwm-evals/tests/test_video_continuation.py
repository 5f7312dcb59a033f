"""How clips go on, with models whose answer is known."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from lwm_core.builtins.byte_tokens import BytesTokenizer
from lwm_core.errors import DataError, ShapeError
from lwm_core.protocols import ChecksSetup, EvalContext, SamplingSpec
from lwm_core.vocab import Vocabulary
from lwm_evals import VideoContinuationOptions, VideoContinuationSuite
from lwm_evals.similarity import psnr

BYTES = BytesTokenizer()
VOCABULARY = Vocabulary(BYTES.size, 768, 512)
FRAMES, LENGTH = 9, 16


class Model:
    """Writes code ``number`` of frame ``t`` by a rule, and keeps what it read."""

    def __init__(self, code: Callable[[int, int, Sequence[int]], int]) -> None:
        self.code, self.read_ids, self.asked = code, [], []  # type: ignore[var-annotated]

    def session(self, *, guided: bool = False) -> Model:
        assert not guided
        self.tokens: list[int] = []
        return self

    def read(self, tokens: Sequence[int], unconditional: Any = None, *, expected: int = 0) -> None:
        self.tokens += tokens
        self.read_ids.append(list(tokens))

    def stream(self, sampling: SamplingSpec) -> Iterator[int]:
        self.asked.append(sampling)
        clip = self.tokens[len(self.tokens) - 1 - self.tokens[::-1].index(ord(">")) :][1:]
        for number in range(sampling.max_new_tokens):
            code = self.code(len(clip) // (LENGTH + 1), number, clip)
            self.tokens.append(BYTES.size + code)
            yield BYTES.size + code

    def close(self) -> None:
        pass


@pytest.fixture
def clip(tmp_path: Path) -> NDArray[np.uint8]:
    """Nine pictures of a bright square on its way; a folder of them, and what they show ``[9,32,32,3]``."""
    frames = np.full((FRAMES, 32, 32, 3), 40, np.uint8)
    for t in range(FRAMES):
        frames[t, 8:20, 2 * t : 2 * t + 12] = (200, 90, 30)
    (tmp_path / "clip").mkdir()
    for t, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / "clip" / f"{t}.png")
    return frames


@pytest.fixture
def make(make_context: Callable[..., EvalContext], encoder: Any, tmp_path: Path) -> Callable[..., EvalContext]:
    def build(model: Model, **changes: Any) -> EvalContext:
        out = tmp_path / "run" / "evals" / "video-continuation"
        told = {"generator": model, "encoder": encoder, "out": out, "vocabulary": VOCABULARY, "stage": "512"}
        return make_context(**{**told, **changes})

    return build


def options(**changes: Any) -> VideoContinuationOptions:
    return VideoContinuationOptions(**{"path": "clip", "given": 3, "frames": 2, **changes})


def test_a_model_that_knows_the_clip_reaches_the_encoder(make: Any, encoder: Any, clip: NDArray[np.uint8]) -> None:
    codes = encoder.encode(clip)
    model = Model(lambda t, number, _: int(codes[4 + t, number]))
    [summary] = VideoContinuationSuite(options()).run(make(model))
    assert summary == {
        "stage": "512", "written": 2, "codes_equal": 1.0, "psnr": summary["encoder_psnr"],
        "encoder_psnr": pytest.approx(psnr(encoder.decode(codes), clip)[7:].mean()),
        "still_psnr": pytest.approx(psnr(encoder.decode(codes[[6, 6]]), clip[7:]).mean()),
    }  # fmt: skip
    assert summary["still_psnr"] < summary["psnr"]
    [prompt, *delimiters] = model.read_ids
    shown = [*(259 + codes[4]), VOCABULARY.eof, *(259 + codes[5]), VOCABULARY.eof, *(259 + codes[6])]
    assert prompt == [BYTES.special_ids["bos"], *b"<vision>", *shown]
    assert delimiters == [[VOCABULARY.eof]] * 2
    assert [(one.temperature, one.ids, one.max_new_tokens) for one in model.asked] == [(0.0, (259, 771), 16)] * 2


def test_a_model_that_repeats_the_last_frame_is_a_still(make: Any, encoder: Any, clip: NDArray[np.uint8]) -> None:
    context = make(Model(lambda t, number, before: before[number - (LENGTH + 1)] - 259), stage="1024")
    suite = VideoContinuationSuite(options(every=2, given=2, frames=2, at=1, caption="a square"))
    [summary] = suite.run(context)
    taken = clip[::2][1:5]
    codes = encoder.encode(taken)
    assert summary["psnr"] == summary["still_psnr"] < summary["encoder_psnr"]
    assert summary["codes_equal"] == pytest.approx((codes[2:] == codes[1]).mean())
    rows = json.loads(Path(f"{context.out}.json").read_text())["rows"]
    assert [row["frame"] for row in rows] == [3, 4]
    words = bytes(token for token in context.generator.read_ids[0] if token < 256)
    assert words.endswith(b"Generate a video of a square ASSISTANT: <vision>")
    [picture] = suite.draw(context.out).values()
    shown = np.asarray(Image.open(BytesIO(picture)))
    assert shown.shape == (3 * 132 - 4, 4 * 132 - 4, 4)
    assert not shown[2 * 132 :, : 2 * 132 - 4, 3].any(), "nothing was written before the third frame"
    assert np.abs(shown[50, 34, :3].astype(int) - (200, 90, 30)).max() < 8, "inside the square"


def test_every_stage_that_holds_the_clip_is_asked_once(make: Any, encoder: Any, clip: NDArray[np.uint8]) -> None:
    suite, model = VideoContinuationSuite(options()), Model(lambda *_: 5)
    assert suite.run(make(model, stage="base", start_seq_len=64)) == [] and not model.asked
    for stage in ("base", "512", "512", "1024"):
        [row] = VideoContinuationSuite(options()).run(make(model, stage=stage))
        assert row["stage"] == stage
    assert len(model.asked) == 6
    context = make(model)
    assert [row["stage"] for row in json.loads(Path(f"{context.out}.json").read_text())["summary"]] == [
        "base", "512", "1024",
    ]  # fmt: skip
    VideoContinuationSuite(options(given=2)).run(context)
    assert len(model.asked) == 8, "another question is another answer"


def test_what_cannot_be_continued_is_told(make: Any, encoder: Any, clip: NDArray[np.uint8], tmp_path: Path) -> None:
    def refused(error: type[Exception], words: str, **changes: Any) -> None:
        suite, context = VideoContinuationSuite(options(**changes)), make(Model(lambda *_: 0), stage="1024")
        assert isinstance(suite, ChecksSetup)
        with pytest.raises(error, match=words):
            suite.check(context)

    refused(DataError, "^video-continuation: .*nothing: there is no picture or video", path="nothing")
    refused(DataError, "^video-continuation: lwm-no:a: lwm-no is not installed", path="lwm-no:a")
    refused(DataError, r"has 9 frames \(every = 1\), but 8 given and 2 written need 10", given=8)
    refused(
        DataError,
        r"has 3 frames \(every = 3\), but 1 given and 2 written from frame 1 on need 4",
        given=1,
        every=3,
        at=1,
    )
    refused(ShapeError, "60 frames given and 2 written are 1063 tokens, but the longest stage has 1024", given=60)
    with pytest.raises(ValueError, match="given"):
        options(given=0)
